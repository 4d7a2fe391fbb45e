"""`generate`: the same tokens as transformers, whole characters, and an end at end-of-text."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import command
import pytest
import torch
from torch import Tensor, nn

from factory_train import cli
from factory_train.data.tokenizer import Tokenizer
from factory_train.errors import ConfigError, ExitCode
from factory_train.models.generate import continuation, generate
from factory_train.run_dir import RunDir
from factory_train.text_model import TextModel

PROMPT = "the quick brown"
TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """One small finished run with two checkpoints; it has learned its one sentence, so greedy text varies."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    words = ("recipe=llama_ddp", "run=small", "data.path=text.txt", *command.SMALL, "tracking=none", "train.steps=120", "optim.lr=0.01")
    done = command.run(*words, "checkpoint.every_steps=60", "launcher.tasks_per_node=1", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs/llama_ddp-small")


def text_of(*words: str) -> str:
    """Returns what `generate` writes, run in this process."""
    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        assert cli.main(["generate", *words]) == ExitCode.OK
    finally:
        sys.stdout = before
    return out.getvalue().removesuffix("\n")


class Scripted(nn.Module):
    """Predicts the tokens of a script, one after another, whatever the prompt of `prompt_len` tokens was."""

    def __init__(self, script: list[int], prompt_len: int, vocab_size: int) -> None:
        super().__init__()
        self.script, self.prompt_len, self.vocab_size = script, prompt_len, vocab_size
        self.max_seq_len = 1000
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, self.vocab_size)
        logits_BTV[0, -1, self.script[tokens_BT.shape[1] - self.prompt_len]] = 1.0
        return logits_BTV


class Fixed(nn.Module):
    """Predicts the same distribution after every token."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.max_seq_len = 4
        self.logits_V = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits_V.expand(*tokens_BT.shape, -1)


@pytest.mark.cluster
def test_greedy_text_of_run_and_export_is_that_of_transformers_token_by_token(run: RunDir, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.export)
    prompt = Tokenizer.load(run.export / "tokenizer.json", None).encode(PROMPT)
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    assert len(set(expected[len(prompt) :])) > 3
    for where in (str(run.path), str(run.export)):
        ours = TextModel.open(where, tmp_path)
        assert generate(ours.model, prompt, TOKENS, eos_id=ours.tokenizer.eos_id) == expected
        assert text_of(where, PROMPT, f"tokens={TOKENS}") == ours.tokenizer.decode(expected[len(prompt) :])


@pytest.mark.cluster
def test_run_at_step_means_that_checkpoint(run: RunDir) -> None:
    root = f"runs_root={run.path.parent}"
    # Far from certain, so that two checkpoints differ in what they say.
    words = (PROMPT, root, "temperature=2")
    newest, first = text_of("small", *words), text_of("small@60", *words)
    assert newest == text_of("small@120", *words)
    assert newest != first
    assert first == text_of(str(run.checkpoints / "step-00000060"), *words)


@pytest.mark.cluster
def test_a_copied_run_directory_and_a_pipe_are_enough(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    done = subprocess.run(
        [sys.executable, "-m", "factory_train", "generate", "copy", "-", "tokens=8"],
        cwd=tmp_path,
        env=command.environment(),
        input=PROMPT + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(str(run.path), PROMPT, "tokens=8") + "\n"
    assert done.stderr == ""


@pytest.mark.cluster
def test_sampled_text_repeats_with_its_seed(run: RunDir) -> None:
    words = (str(run.path), PROMPT, "temperature=2", "top_p=0.95")
    texts = [text_of(*words, f"seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert text_of(str(run.path), "", "tokens=4") != ""


@pytest.mark.cluster
def test_a_damaged_export_is_refused(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run.export, tmp_path / "export")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert cli.main(["generate", str(copy), PROMPT]) == ExitCode.INTEGRITY
    assert "model.safetensors: the export is damaged" in capsys.readouterr().err


@pytest.mark.cluster
def test_a_folder_that_export_did_not_write_is_refused(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run.export, tmp_path / "export")
    (copy / "manifest.json").unlink()
    assert cli.main(["generate", str(copy), PROMPT]) == ExitCode.USAGE
    assert "not exported by factory_train" in capsys.readouterr().err


def test_pieces_are_whole_characters_and_end_before_end_of_text() -> None:
    tokenizer = Tokenizer.train("byte", [], [], 257)
    assert tokenizer.eos_id is not None
    script = [*"Grüße, 世界".encode(), tokenizer.eos_id, *b"more"]
    model = TextModel(Scripted(script, 1, tokenizer.vocab_size), tokenizer, torch.device("cpu"))  # type: ignore[arg-type]
    pieces = list(model.continuation("x", 100))
    assert "".join(pieces) == "Grüße, 世界"
    assert [piece for piece in pieces if piece] == list("Grüße, 世界")
    # Cut off inside of a character: what is there is shown as what it is.
    assert "".join(model.continuation("x", 3)) == "Gr\ufffd"


def test_each_piece_reaches_a_terminal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        flushed: list[str] = []

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    tokenizer = Tokenizer.train("byte", [], [], 257)
    model = TextModel(Scripted(list(b"abcd"), 1, tokenizer.vocab_size), tokenizer, torch.device("cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(TextModel, "open", lambda *_: model)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert cli.main(["generate", "run", "x", "tokens=4"]) == ExitCode.OK
    assert terminal.flushed[:4] == ["a", "ab", "abc", "abcd"]


def test_top_p_samples_from_the_smallest_set_of_tokens_that_reaches_it() -> None:
    model = Fixed([0.05, 0.5, 0.3, 0.15])
    for top_p, nucleus in ((0.4, {1}), (0.5, {1}), (0.75, {1, 2}), (0.85, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        seen = continuation(model, [0], 300, temperature=1.0, top_p=top_p, generator=torch.Generator().manual_seed(0))
        assert set(seen) == nucleus, top_p


def test_an_empty_prompt_needs_an_end_of_text_to_start_from() -> None:
    tokenizer = Tokenizer.train("char", [], ["ab"], 0)
    model = TextModel(Fixed([0.5, 0.5]), tokenizer, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt is empty"):
        list(model.continuation("", 3))


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "which run?"),
        (["mine"], 2, "which prompt?"),
        (["mine", "two", "words"], 2, 'put it in quotes: "two words"'),
        (["mine", "x", "token=3"], 2, "did you mean tokens=3?"),
        (["mine", "x", "tokens=-3"], 2, "'-3' is not a whole number"),
        (["mine", "x", "temperature=-1"], 2, "not a number from 0 on"),
        (["mine", "x", "temperature=inf"], 2, "not a number from 0 on"),
        (["mine", "x", "top_p=1.5"], 2, "not a number from 0 to 1"),
        (["mine", "x", "top_p=0"], 2, "temperature=0"),
        (["mine", "x = 1", "--greedy"], 2, "unknown flag"),
        (["mine", "- a list", "runs_root=runs"], 4, "no run 'mine'"),
        (["mine@", "x"], 2, "no step after '@'"),
    ],
)
def test_mistakes_are_refused_with_their_fix(
    words: list[str], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *words]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "\n  fix: " in err
