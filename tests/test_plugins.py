"""Plugins: the worked example of docs/extending.md from end to end, and what is said about one that is broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import command
import pytest
from conftest import REPOSITORY

from factory_train.checkpoint.reader import CheckpointReader
from factory_train.compose import compose
from factory_train.config import Config, ModelConfig
from factory_train.errors import ConfigError, ExitCode
from factory_train.hardware import Hardware
from factory_train.overrides import sweep_points
from factory_train.plan import make_plan
from factory_train.registries import Registry
from factory_train.run_dir import RunDir

RECIPE = "recipe=llama_fsdp"
CHOICES = (
    *("plugins=[my_package]", "model.architecture=parallel_llama", "data.name=squares", "train.loss=z_loss"),
    *("optim.name=signum", "optim.lr=1e-3", "optim.schedule=inverse_sqrt"),
)
WORDS = (RECIPE, "run=mine", *CHOICES, *command.SMALL, "tracking=none", "launcher.tasks_per_node=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the tree with the package of the page in it."""
    path = tmp_path_factory.mktemp("plugins")
    blocks = re.findall(r"```python (\S+)\n(.*?)```", (REPOSITORY / "docs/extending.md").read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_package/__init__.py", "my_package/parts.py"]
    for name, text in blocks:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> RunDir:
    """A run of four steps on two ranks that uses everything of the package."""
    done = command.run(*WORDS, "train.steps=4", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the architecture is a plugin's" in done.stdout
    return RunDir.open(folder / "runs/llama_fsdp-mine")


@pytest.mark.cluster
def test_the_example_of_the_page_trains_on_two_ranks(trained: RunDir, folder: Path) -> None:
    rows = [row for row in trained.metrics() if row["kind"] == "train"]
    # Two steps of warm-up, then the schedule of the page over the other two.
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 / 50.5**0.5])
    assert CheckpointReader(trained.checkpoints / "step-00000004").sections() == ["optimizer/momentum", "weights"]
    assert json.loads((trained.data / "manifest.json").read_text())["kind"] == "squares"
    attempt = trained.last_attempt()
    assert attempt is not None
    recorded = json.loads((attempt.path / "code.json").read_text())["plugins"]["my_package"]
    assert recorded["file"] == str(folder / "my_package/__init__.py")
    assert len(recorded["sha256"]) == 64


@pytest.mark.cluster
@pytest.mark.long
def test_a_run_with_plugins_resumes_evaluates_and_generates(trained: RunDir, folder: Path) -> None:
    resumed = command.run("resume", "mine", "train.steps=6", cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    attempt = trained.last_attempt()
    assert attempt is not None
    events = [json.loads(line) for line in (attempt.path / "events.jsonl").read_text().splitlines()]
    assert [event["optimizer"] for event in events if event["event"] == "resume"] == ["loaded"]
    assert [row["step"] for row in trained.metrics() if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    evaluated = command.run("evaluate", "mine", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    last = [row for row in trained.metrics() if row["kind"] == "validation"][-1]
    assert f"loss {last['loss']:.4f}" in evaluated.stdout
    generated = command.run("generate", "mine", "The square of ", "tokens=4", cwd=folder)
    assert generated.returncode == 0, generated.stdout + generated.stderr
    assert len(generated.stdout) > 1


@pytest.mark.cluster
def test_an_architecture_without_hugging_face_layout_is_not_exported(trained: RunDir, folder: Path) -> None:
    assert not (trained.export / "config.json").exists()
    done = command.run("export", "mine", cwd=folder)
    assert done.returncode == ExitCode.USAGE
    assert "architecture 'parallel_llama' is a plugin's" in done.stderr


@pytest.mark.cluster
def test_a_run_whose_plugin_is_not_here_says_what_is_missing(trained: RunDir, tmp_path: Path) -> None:
    done = command.run("evaluate", str(trained.path), cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE
    assert "plugins: my_package: no module named 'my_package'" in done.stderr
    assert "PYTHONPATH" in done.stderr


@pytest.mark.cluster
@pytest.mark.long
def test_training_minimises_the_named_loss_and_validation_stays_the_cross_entropy(tmp_path: Path) -> None:
    (tmp_path / "tripled.py").write_text(
        "from factory_train.loss import summed_cross_entropy\n"
        "from factory_train.registries import LOSSES\n"
        "@LOSSES.register('tripled')\n"
        "def tripled(logits_BTV, targets_BT):\n"
        "    return 3 * summed_cross_entropy(logits_BTV, targets_BT)\n"
    )
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    words = ("recipe=llama_ddp", "run=tripled", "plugins=[tripled]", "train.loss=tripled", "data.path=text.txt", *command.SMALL)
    done = command.run(*words, "tracking=none", "train.steps=3", "launcher.tasks_per_node=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = RunDir.open(tmp_path / "runs/llama_ddp-tripled").metrics()
    training, validation = ([row["loss"] for row in rows if row["kind"] == kind][-1] for kind in ("train", "validation"))
    assert training == pytest.approx(3 * validation, rel=0.05)


def test_a_plugin_that_declares_leaves_torch_out_of_submitting(folder: Path) -> None:
    program = (
        "import sys; from factory_train.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy'} & set(sys.modules); sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    words = [*WORDS[:1], "run=other", *WORDS[2:], "--dry-run"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=folder, env=command.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_plugins_may_stand_in_groups_of_ones_own_and_their_data_has_the_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim/mine.yaml").write_text("name: signum\nschedule: inverse_sqrt\nlr: 0.001\n")
    words = (RECIPE, "plugins=[my_package]", "optim=mine", "data.name=squares", "data.path=numbers.txt")
    done = command.run(*words, "--config-dir", str(tmp_path), "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.name: builtin -> squares" in done.stdout
    assert f"data.path: null -> {folder}/numbers.txt" in done.stdout


def test_the_plan_of_a_foreign_architecture_says_that_it_is_an_estimate_and_has_no_peak() -> None:
    card = Hardware("a card", "cuda", 2, 80 * 10**9, 989.4e12)
    ours, foreign = (make_plan(Config(recipe="r", model=ModelConfig(architecture=name)), 257, card, True) for name in ("llama", "mine"))
    assert (ours.peak_flops, foreign.peak_flops) == (989.4e12, None)
    assert [line for line in foreign.lines() if line.startswith("note ")]
    assert not [line for line in ours.lines() if line.startswith("note ")]


@pytest.mark.parametrize(
    ("source", "message", "fix"),
    [
        ("x = 1\nraise ValueError('odd')\n", r"broken\.py, line 2: cannot be imported: ValueError: odd", "mend that line"),
        ("x = 1\ny = = 2\n", r"broken\.py, line 2: cannot be imported: SyntaxError: invalid syntax", "mend that line"),
        ("import json\njson.loads('')\n", r"broken\.py, line 2: cannot be imported: JSONDecodeError", "mend that line"),
        ("\nimport absent_package\n", r"broken\.py, line 2: .*No module named 'absent_package'", "mend that line"),
        ("import sys\nsys.exit()\n", r"broken\.py, line 2: cannot be imported: SystemExit", "mend that line"),
        (
            "from factory_train.registries import SCHEDULES\n@SCHEDULES.register('wsd')\ndef mine(progress, cfg): ...\n",
            r"two schedules are named 'wsd': factory_train\.schedule\.wsd and broken\.mine",
            "another name",
        ),
    ],
    ids=["raises", "syntax", "raises-deep-inside", "needs-another", "exits", "name-taken"],
)
def test_a_broken_plugin_is_refused_with_its_line(source: str, message: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(source)
    done = command.run(RECIPE, "plugins=[broken]", "--dry-run", cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert re.fullmatch(r"error: [^\n]+\n  fix: [^\n]+\n", done.stderr), done.stderr
    assert fix in done.stderr


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["plugins=[absent]"], "no module named 'absent'", "start python -m factory_train in the folder that holds absent"),
        (["plugins=[json.absent]"], "no module named 'json.absent'", "install it"),
        (["plugins=[my/plugin.py]"], "not the name of a module", "plugins=[my.plugin]"),
        (["plugins=[7up]"], "not the name of a module", "import my_package"),
        (["plugins=json"], "'json' is not a list", "plugins=[json]"),
        (["plugins=json,csv"], "'json,csv' is not a list", "plugins=[json,csv]"),
        (["optim.schedule=cosin"], "not one of: wsd cosine linear constant", "optim.schedule=cosine"),
        (["optim.name=lion"], "not one of: adamw", "plugins=[PACKAGE]"),
        (["train.loss=z_loss"], "not one of: cross_entropy", "train.loss=cross_entropy"),
    ],
)
def test_names_that_cannot_be_right_are_refused(words: list[str], message: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([RECIPE, *words])
    assert message in caught.value.what
    assert fix in (caught.value.fix or "")


def test_a_list_keeps_its_order_through_overrides_and_sweeps() -> None:
    assert compose([RECIPE]).plugins == []
    assert compose([RECIPE, "plugins=[textwrap,json.decoder]"]).plugins == ["textwrap", "json.decoder"]
    points = sweep_points([RECIPE, "plugins=[textwrap,json]", "optim.lr=1e-3,2e-3"])
    assert [compose(point).plugins for point in points] == [["textwrap", "json"]] * 2


def test_a_name_belongs_to_one_entry() -> None:
    registry: Registry[object] = Registry("thing", "some.key", {"own": "json:loads"})
    assert registry.get("own") is json.loads
    mine = registry.register("mine")(object())
    assert registry.get("mine") is mine
    registry.declare("later", "json:dumps")
    # A module that is imported twice meets its own entries.
    registry.declare("later", "json:dumps")
    assert registry.get("later") is json.dumps
    for name in ("own", "mine", "later"):
        with pytest.raises(ConfigError, match=f"two things are named '{name}'"):
            registry.declare(name, "csv:reader")
        with pytest.raises(ConfigError, match=f"two things are named '{name}'"):
            registry.register(name)(sorted)
    assert registry.names() == ("own", "mine", "later")


def test_a_declared_entry_that_is_not_there_is_refused_when_asked_for() -> None:
    registry: Registry[object] = Registry("thing", "some.key", {})
    registry.declare("gone", "absent_package.parts:thing")
    registry.declare("other", "json:thing")
    with pytest.raises(ConfigError, match="no module named 'absent_package'"):
        registry.get("gone")
    with pytest.raises(ConfigError, match="json:thing, which is not there"):
        registry.get("other")
