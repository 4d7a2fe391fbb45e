"""DiLoCo's kernels and islands on one CUDA card (`-m gpu`). Unverified by the authors: no card was at hand when they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from island_processes import run_islands, start_run
from test_diloco_runs import curve, differences, island_settings, text_file  # noqa: F401 (a fixture)
from toy_islands import config, equal, parameters, train

from benchmarks.kernel_sections import pseudogradient as section
from factory_train.distributed.outer_state import OuterState
from factory_train.gangs import island_names

pytestmark = pytest.mark.gpu


def test_kernels_agree_with_the_reference_bit_for_bit() -> None:
    assert torch.cuda.is_available(), "this test needs a CUDA card"
    wrong = [row for row in section.correctness("cuda") if not row["ok"]]
    assert not wrong


@pytest.mark.parametrize("payload", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_the_outer_state_on_the_card_is_that_of_the_cpu(payload: str, keep: float) -> None:
    fragments = [["embedding", "norm"], ["layers.0.w", "layers.0.norm"], ["layers.1.w", "layers.2.w"]]
    prints: dict[str, list[int]] = {}
    ends = {}
    for device in ("cpu", "cuda"):
        values = {name: value.to(device) for name, value in parameters().items()}
        state = OuterState(values, fragments, payload, error_feedback=True)
        for step in range(6):
            for value in values.values():
                value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(step)).to(device)
            fragment = step % len(fragments)
            encoded = state.encode(fragment)
            encoded.wait()
            parts = state.apply(fragment, encoded.codes, encoded.scales, lr=0.7, momentum=0.9, keep=keep)
            state.accept(fragment, encoded)
            prints.setdefault(device, []).append(int(parts.sum()))
            assert prints[device][-1] == state.fingerprint(fragment)
        named = {kind: state.named(kind) for kind in ("outer", "momentum", "error")}
        ends[device] = {f"{kind} {name}": value.cpu() for kind, of_kind in named.items() for name, value in of_kind.items()}
    assert prints["cpu"] == prints["cuda"]
    assert equal(ends["cpu"], ends["cuda"])


@pytest.mark.parametrize("settings", [{}, {"sync_every": 6, "fragments": 3, "delay": 2, "payload": "int4"}], ids=["classic", "streaming"])
def test_islands_on_a_card_end_where_those_on_the_cpu_do(tmp_path: Path, settings: dict) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        toys = train(tmp_path / device, steps=25, cfg=config(**settings), device=device)
        assert equal(toys[0].outer_values(), toys[1].outer_values())
        ends.append({name: value.cpu() for name, value in toys[0].outer_values().items()})
    assert equal(*ends)


def test_a_run_of_islands_on_a_card_resumes_inside_of_an_overlap_window(text_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """Bit for bit; and it computes what the CPU does, up to rounding."""
    runs = {}
    for name, device in (("cpu", "cpu"), ("undisturbed", "cuda"), ("stopped", "cuda")):
        cfg = island_settings(text_file, tmp_path)
        cfg.hardware.device = device
        runs[name] = start_run(tmp_path, name, cfg).run
    orders = [{"run_dir": str(run.path)} for run in runs.values()]
    run_islands([*orders[:2], orders[2] | {"stop_at": 5}, orders[2]], islands=2)
    for island in island_names(2):
        assert curve(runs["stopped"], island) == curve(runs["undisturbed"], island)
        pairs = zip(curve(runs["cpu"], island), curve(runs["undisturbed"], island), strict=True)
        assert max(abs(a[1] - b[1]) / a[1] for a, b in pairs) <= 1e-3
    assert not differences(runs["stopped"], runs["undisturbed"])
