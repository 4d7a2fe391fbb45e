"""Profiles, garbage collection, the step breakdown, host synchronisations, and what is said when memory runs out."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import shutil
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import command
import pytest
import torch
from synthetic_run import new_run

from factory_train.checks import check_config, check_world
from factory_train.commands.status import run_status
from factory_train.compose import compose
from factory_train.config import Config
from factory_train.diagnostics.garbage import GarbageCollection
from factory_train.diagnostics.out_of_memory import Use, explain, is_out_of_memory, remedies
from factory_train.diagnostics.profiler import StepProfiler
from factory_train.diagnostics.sync_check import SyncCheck
from factory_train.errors import ConfigError, ExitCode
from factory_train.hardware import Hardware
from factory_train.heartbeat import PHASES, Place
from factory_train.plan import Plan, make_plan
from factory_train.run_dir import Attempt, RunDir
from factory_train.step_clock import StepClock
from factory_train.throughput import Throughput
from factory_train.trainer import Trainer

CPU = torch.device("cpu")
RECIPE = "recipe=llama_fsdp"
GIB = 2**30
BREAKDOWN = ("data_s", "compute_s", "reduce_s", "optimizer_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the plugin beside this file."""
    path = tmp_path_factory.mktemp("diagnostics")
    shutil.copy(Path(__file__).with_name("hungry_plugin.py"), path)
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return path


def words(run: str, loss: str, *more: str) -> tuple[str, ...]:
    return (
        *(RECIPE, f"run={run}", "data.path=text.txt", *command.SMALL, "tracking=none", "launcher=local", "launcher.tasks_per_node=2"),
        *("plugins=[hungry_plugin]", f"train.loss={loss}", "train.validate_every=0", "wait=true", *more),
    )


@pytest.fixture(scope="module")
def profiled(folder: Path) -> Attempt:
    """Eight steps on two ranks, of which rank 0 profiles 4 and 5, with a collection at every third."""
    settings = ("train.steps=8", "profile.steps=4:6", "train.gc_every_steps=3", "train.deterministic=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLLECTED_INTO", str(folder))
        done = command.run(*words("profiled", "cycles", *settings), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile     steps 4 to 5: " in done.stdout
    attempt = RunDir.open(folder / "runs/llama_fsdp-profiled").last_attempt()
    assert attempt is not None
    return attempt


def train_rows(attempt: Attempt) -> list[dict]:
    return [row for row in attempt.run.metrics() if row["kind"] == "train"]


@pytest.mark.cluster
def test_the_trace_holds_exactly_the_chosen_steps_with_their_phases_by_name(profiled: Attempt) -> None:
    files = sorted(path.name for path in (profiled.path / "profile").iterdir())
    assert files == ["rank-00000-steps-4-6.json.gz", "rank-00000-steps-4-6.txt"]
    with gzip.open(profiled.path / "profile" / files[0]) as file:
        ranges = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert sorted(event["name"] for event in ranges if event["name"].startswith("step ")) == ["step 4", "step 5"]
    for step in (event for event in ranges if event["name"].startswith("step ")):
        inside = [event for event in ranges if step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
        named = sorted((event["ts"], event["name"]) for event in inside)
        phases = ("data", "forward", "backward", "reduce", "checkpoint", "optimizer")
        assert [name for _, name in named if name in phases] == list(phases)


@pytest.mark.cluster
def test_the_table_names_the_operators_and_the_event_their_files(profiled: Attempt) -> None:
    (event,) = [event for event in profiled.events() if event["event"] == "profile"]
    assert (event["first"], event["step"]) == (4, 5)
    assert (profiled.path / event["trace"]).is_file()
    text = (profiled.path / event["table"]).read_text()
    assert len(event["top"]) == 10
    assert all(line in text for line in event["top"])
    assert "aten::mm" in text
    assert "Self CPU %" in text
    assert all(line in profiled.log_path("rank-00000").read_text() for line in event["top"])


@pytest.mark.cluster
def test_profiled_steps_are_marked_and_count_for_no_speed(profiled: Attempt) -> None:
    rows = {row["step"]: row for row in train_rows(profiled)}
    assert [step for step, row in rows.items() if row.get("profiled")] == [4, 5]
    assert rows[5]["tokens_per_s"] == rows[4]["tokens_per_s"] == rows[3]["tokens_per_s"]
    mean_s = sum(rows[step]["step_time_s"] for step in (1, 2, 3, 6)) / 4
    assert rows[6]["tokens_per_s"] == pytest.approx(256 / mean_s)
    (event,) = [event for event in profiled.events() if event["event"] == "profile"]
    # Writing the profile lies between the steps 5 and 6, in the time of neither.
    assert event["seconds"] > 0
    assert rows[6]["time"] - rows[5]["time"] < event["seconds"] + 60
    assert rows[5]["step_time_s"] + rows[6]["step_time_s"] <= rows[7]["time"] - rows[4]["time"] + 1


@pytest.mark.cluster
def test_the_breakdown_of_a_step_is_within_its_time(profiled: Attempt) -> None:
    for row in train_rows(profiled):
        assert all(row[name] > 0 for name in BREAKDOWN)
        assert sum(row[name] for name in BREAKDOWN) <= row["step_time_s"]


@pytest.mark.cluster
def test_ranks_collect_garbage_at_the_same_steps_and_only_there(profiled: Attempt, folder: Path) -> None:
    noted = [[tuple(map(int, line.split())) for line in (folder / f"rank-{rank}").read_text().splitlines()] for rank in (0, 1)]
    # Each rank has one micro-batch a step; collections come before the steps 3 and 6. Behind the last step they are Python's again.
    during = [[(calls, generation) for calls, generation, _ in rank if calls < 8] for rank in noted]
    assert during == [[(2, 2), (5, 2)]] * 2
    # The cycles of three steps, which would otherwise stay.
    assert all(collected >= 3 for rank in noted for calls, _, collected in rank if calls == 5)
    assert [row["step"] for row in train_rows(profiled) if "gc_s" in row] == [3, 6]


@pytest.mark.cluster
@pytest.mark.long
def test_diagnostics_change_no_number_and_a_resume_behind_the_window_profiles_nothing(profiled: Attempt, folder: Path) -> None:
    settings = ("train.steps=8", "train.gc_every_steps=0", "train.deterministic=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLLECTED_INTO", str(folder / "runs"))
        plain = command.run(*words("plain", "cycles", *settings), cwd=folder)
        resumed = command.run("resume", "profiled", "train.steps=10", cwd=folder)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    attempt = RunDir.open(folder / "runs/llama_fsdp-plain").last_attempt()
    assert attempt is not None
    losses = [[(row["loss"], row["grad_norm"]) for row in train_rows(each)][:7] for each in (attempt, profiled)]
    assert losses[0] == losses[1]
    second = profiled.run.last_attempt()
    assert second is not None
    assert second.number == 2
    assert not (second.path / "profile").exists()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("loss", "asked"),
    [
        ("too_large_for_the_card", "asking for 21.0MB more"),
        pytest.param("too_large_for_the_host", "asking for 4000TB more", marks=pytest.mark.long),
    ],
)
def test_running_out_of_memory_says_what_to_change_and_is_not_tried_again(folder: Path, loss: str, asked: str) -> None:
    # Activations are most of this plan, so the batch decides.
    large = ("train.seq_len=512", "train.global_batch_tokens=16384", "train.micro_batch_size=16", "model.num_layers=4", "model.dim=128")
    done = command.run(*words(loss, loss, "train.steps=4", *large), cwd=folder)
    assert done.returncode == ExitCode.PREFLIGHT, done.stdout + done.stderr
    assert f"memory ran out in step 3 (compute), {asked}" in done.stderr
    assert "Traceback" not in done.stderr
    attempt = RunDir.open(folder / f"runs/llama_fsdp-{loss}").last_attempt()
    assert attempt is not None
    error, verdict = attempt.error(), attempt.verdict()
    assert error is not None
    assert verdict is not None
    assert verdict.outcome == "failed-user"
    assert error["hint"].startswith("train.micro_batch_size=8 (")
    report = (attempt.path / "out-of-memory" / f"rank-{error['rank']:05d}.txt").read_text()
    assert f"fix: {error['hint']}" in report
    assert all(words in report for words in ("activations", "planned in all", "held at most", "free on this machine"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_real_refusal_of_the_host_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


def planned(*settings: str, world: int = 8) -> tuple[Config, Plan]:
    cfg = compose([RECIPE, *settings])
    cfg.launcher.tasks_per_node = world
    return cfg, make_plan(cfg, 128256, Hardware("a card", "cuda", world, 80 * GIB, None), True)


def test_a_smaller_micro_batch_is_proposed_as_far_as_it_has_to_shrink() -> None:
    cfg, plan = planned(
        "model=llama3_1b", "train.seq_len=4096", "train.global_batch_tokens=1048576", "train.micro_batch_size=16", "precision=bf16"
    )
    first = remedies(cfg, plan, Use(peak=int(79 * GIB), requested=GIB, available=80 * GIB))[0]
    rows = int(first.partition("=")[2].partition(" ")[0])
    assert rows < 16
    fitting = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch_size=rows))
    assert make_plan(fitting, 128256, Hardware("a card", "cuda", 8, None, None), True).memory.total <= 0.95 * 80 * GIB
    double = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch_size=2 * rows))
    assert make_plan(double, 128256, Hardware("a card", "cuda", 8, None, None), True).memory.total > 0.95 * 80 * GIB


def test_where_state_is_the_largest_part_sharding_is_proposed_and_no_smaller_batch() -> None:
    cfg, plan = planned(
        "model=llama3_8b", "parallel=ddp", "train.seq_len=512", "train.micro_batch_size=1", "train.global_batch_tokens=4096"
    )
    use = Use(peak=79 * GIB, requested=GIB, available=80 * GIB)
    found = remedies(cfg, plan, use)
    assert any(text.startswith("parallel=fsdp (") for text in found)
    assert not any(text.startswith("train.micro_batch_size") for text in found)
    place = Place()
    assert "before the first step" in explain(cfg, plan, use, place).what
    assert "weights, gradients and optimizer state" in explain(cfg, plan, use, place).what
    place.enter(7, "compute")
    assert "in step 8 (compute)" in explain(cfg, plan, use, place).what


def test_the_place_of_a_rank_follows_the_phases_of_the_step_and_keeps_when_each_began() -> None:
    stop = SimpleNamespace(place=Place())
    trainer = SimpleNamespace(step=3, stop=stop, clock=SimpleNamespace(enter=lambda phase: None))
    seen = []
    for phase in ("data", "forward", "backward", "forward", "backward", "reduce", "checkpoint", "optimizer"):
        Trainer._enter(trainer, phase)  # type: ignore[arg-type]
        seen.append(stop.place.now)
    assert [place[:2] for place in dict.fromkeys(seen)] == [(3, "data"), (3, "compute"), (3, "reduce"), (3, "update")]
    assert {phase for _, phase, _ in seen} < set(PHASES)


def test_what_was_used_beyond_the_plan_is_counted_in_every_figure() -> None:
    cfg, plan = planned("model=llama3_1b", "train.seq_len=4096", "train.global_batch_tokens=1048576", "train.micro_batch_size=8")
    exact = remedies(cfg, plan, Use(plan.memory.total, None, None))
    beyond = remedies(cfg, plan, Use(plan.memory.total + 10 * GIB, None, None))
    assert [text.partition(" ")[0] for text in exact] == [text.partition(" ")[0] for text in beyond]
    assert exact != beyond


@pytest.mark.parametrize(
    ("setting", "message", "fix"),
    [
        ("profile.steps=ten", "'ten' is not START:STOP", "profile.steps=10:13"),
        ("profile.steps=613", "'613' is not START:STOP", 'in a YAML file with quotes: steps: "10:13"'),
        ("profile.steps=13:10", "holds no step", "profile.steps=10:13"),
        ("profile.steps=0:3", "the first is 1", "profile.steps=10:13"),
        ("profile.steps=-3:3", "is not START:STOP", "profile.steps=10:13"),
        ("profile.steps=558:562", "the run ends after step 560", "profile.steps=null"),
        ("profile.steps=100:200", "too large to open", "profile.steps=100:103"),
        ("profile.ranks=0", "'0' is not a list of whole numbers", "profile.ranks=[0]"),
        ("profile.ranks=[a]", "'[a]' is not a list of whole numbers", "profile.ranks=[0]"),
        ("train.gc_every_steps=-1", "must not be negative", "train.gc_every_steps=0"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(setting: str, message: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(compose([RECIPE, setting]))
    assert message in caught.value.what
    assert fix in (caught.value.fix or "")


def test_the_window_is_half_open_and_ranks_are_numbers() -> None:
    config = compose([RECIPE, "profile.steps=10:13", "profile.ranks=[0,3]"])
    assert config.profile.window() == range(10, 13)
    assert config.profile.ranks == [0, 3]
    assert compose([RECIPE, "train.steps=560", "profile.steps=558:561"]).profile.window() == range(558, 561)
    assert compose([RECIPE]).profile.window() is None


def test_a_rank_that_is_not_there_is_refused() -> None:
    config = compose([RECIPE, "profile.steps=10:13", "profile.ranks=[4]"])
    with pytest.raises(ConfigError, match="no rank 4 among 2"):
        check_world(config, 2)
    check_world(config, 8)


def test_a_run_that_ends_inside_the_window_keeps_what_was_recorded(tmp_path: Path) -> None:
    cfg, events = Config(recipe="r").profile, []
    cfg.steps = "2:9"
    profiler = StepProfiler(cfg, tmp_path / "profile", 0, CPU, lambda kind, **facts: events.append((kind, facts)))
    for step in (1, 2, 3):
        profiler.before_step(step)
        torch.ones(4) @ torch.ones(4)
        profiler.after_step(step)
    profiler.before_step(4)
    profiler.close()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-00000-steps-2-4.json.gz", "rank-00000-steps-2-4.txt"]
    assert [kind for kind, _ in events] == ["profile"]
    profiler.close()
    assert len(events) == 1


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    cfg, events = Config(recipe="r").profile, []
    cfg.steps = "1:2"
    (tmp_path / "profile").write_text("a file where the folder belongs")
    profiler = StepProfiler(cfg, tmp_path / "profile", 0, CPU, lambda kind, **facts: events.append((kind, facts)))
    profiler.before_step(1)
    profiler.after_step(1)
    assert [kind for kind, _ in events] == ["profile-failed"]
    assert "FileExistsError" in events[0][1]["message"]


@pytest.fixture
def _own_collector() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


class _Thing:
    """May be referred to weakly."""

    cycle: object = None


@pytest.mark.usefixtures("_own_collector")
def test_cycles_live_until_the_next_collection_and_pythons_collector_is_back_in_the_end() -> None:
    garbage, alive = GarbageCollection(every_steps=4), []
    garbage.begin()
    assert not gc.isenabled()
    for step in range(1, 41):
        garbage.before_step(step)
        thing = _Thing()
        thing.cycle = thing
        alive.append(weakref.ref(thing))
        del thing
        assert sum(ref() is not None for ref in alive) <= 4
    assert garbage.take_spent_s() > 0
    assert garbage.take_spent_s() == 0
    garbage.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("_own_collector")
def test_zero_leaves_the_collector_alone() -> None:
    garbage = GarbageCollection(every_steps=0)
    garbage.begin()
    garbage.before_step(1)
    garbage.collect()
    assert gc.isenabled()
    assert garbage.take_spent_s() == 0


class _Queue:
    """A device's work: events get the time at which the device reaches them."""

    now_s = 0.0

    def __init__(self) -> None:
        self.waited_for: list[float] = []

    def event(self) -> _Queue._Event:
        return self._Event(self)

    class _Event:
        def __init__(self, queue: _Queue) -> None:
            self._queue = queue

        def record(self) -> None:
            self.time_s = self._queue.now_s

        def synchronize(self) -> None:
            self._queue.waited_for.append(self.time_s)

        def elapsed_time(self, end: _Queue._Event) -> float:
            return (end.time_s - self.time_s) * 1e3


def test_on_a_card_phases_lie_between_events_and_the_update_is_that_of_the_step_before() -> None:
    queue = _Queue()
    clock = StepClock(torch.device("cuda"), queue.event)

    def step(*phases: tuple[str, float]) -> None:
        for phase, seconds in phases:
            clock.enter(phase)
            queue.now_s += seconds
        clock.leave()

    passes = (("forward", 1.0), ("backward", 2.0), ("forward", 1.0), ("backward", 2.0))
    step(("data", 0.0), *passes, ("reduce", 0.25), ("checkpoint", 0.125), ("optimizer", 0.5))
    first = clock.read()
    assert first == pytest.approx({"data_s": 0.0, "compute_s": 6.0, "reduce_s": 0.25}, abs=1e-9)
    # The device was idle for an hour, but the host waited for the batch only a moment.
    step(("data", 3600.0), *passes, ("reduce", 0.25), ("checkpoint", 0.0), ("optimizer", 0.75))
    second = clock.read()
    assert 0 < second.pop("data_s") < 60
    assert second == pytest.approx({"compute_s": 6.0, "reduce_s": 0.25, "optimizer_s": 0.5})
    # Waited for: the end of each reduction, behind which the host stands anyway.
    assert queue.waited_for == pytest.approx([6.25, 6.875 + 3606.25])


def test_host_phases_add_up_over_micro_batches() -> None:
    clock = StepClock(CPU)
    for phase in ("data", "forward", "backward", "forward", "backward", "reduce", "checkpoint", "optimizer"):
        clock.enter(phase)
    clock.leave()
    assert sorted(clock.read()) == sorted(BREAKDOWN)


def _host_waits() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:161.)", UserWarning, stacklevel=1)


def test_the_place_where_the_host_waits_is_named_once_and_other_warnings_pass() -> None:
    """A stand-in for the card: it issues the warning that PyTorch issues in this mode."""
    modes, events = [], []
    check = SyncCheck(torch.device("cuda"), lambda kind, **facts: events.append((kind, facts)), lambda mode: modes.append(mode))
    with warnings.catch_warnings(record=True) as passed:
        warnings.simplefilter("always")
        for step in range(1, 21):
            check.before_step()
            if modes and modes[-1] == "warn":
                _host_waits()
                _host_waits()
                warnings.warn("something else", UserWarning, stacklevel=1)
            check.after_step(step)
    assert modes == ["warn", "default"] * 3
    (event,) = events
    assert event[0] == "host-sync"
    assert event[1]["step"] == 8
    line = _host_waits.__code__.co_firstlineno + 1
    assert event[1]["places"] == [f"{__file__}:{line} in _host_waits (2 times a step)"]
    assert [str(warning.message) for warning in passed] == ["something else"] * 3


def test_on_the_cpu_no_synchronisation_is_looked_for() -> None:
    modes: list[object] = []
    check = SyncCheck(CPU, lambda kind, **facts: None, modes.append)
    for step in range(1, 21):
        check.before_step()
        check.after_step(step)
    assert modes == []


@pytest.mark.parametrize(("data_s", "shown"), [(0.2, ", data wait 40%"), (0.04, "")])
def test_waiting_for_data_is_shown_where_it_is_significant(tmp_path: Path, data_s: float, shown: str) -> None:
    run, attempt, _ = new_run(tmp_path)
    rows = [{"kind": "start", "step": 0, "time": 0.0}]
    figures = {"loss": 3.0, "tokens_per_s": 1000.0, "step_time_s": 0.5, "data_s": data_s}
    rows += [{"kind": "train", "step": step, "time": 0.0, **figures} for step in range(1, 31)]
    attempt.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wait = run_status(run).data_wait
    assert (f", data wait {wait:.0%}" if wait else "") == shown


def test_a_slowed_step_counts_for_no_speed() -> None:
    throughput = Throughput(tokens_per_step=100, flops_per_token=1.0, world_size=1, peak_flops=None, device=CPU)
    assert throughput.step_done(typical=False)["tokens_per_s"] > 0
    speed = throughput.step_done()["tokens_per_s"]
    assert throughput.step_done(typical=False)["tokens_per_s"] == speed
