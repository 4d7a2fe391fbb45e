"""report.html: one page that needs nothing else, and says what the run directory says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import BASELINES, START_S, finish, new_run, train

from factory_train import storage
from factory_train.commands.report import main
from factory_train.config import dump_config
from factory_train.curves import bucket_means, read_curves, thinned
from factory_train.errors import NotFoundError
from factory_train.plots import draw_plots
from factory_train.report import write_report
from factory_train.run_dir import Attempt, RunDir
from factory_train.tracking.facts import html_report_path, read_facts

_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def said(self) -> str:
        return " ".join(self.words)


def page_of(run: RunDir) -> Page:
    write_report(run)
    return Page(html_report_path(run).read_text())


def write_steps(attempt: Attempt, steps: range, **figures: float) -> None:
    for step in steps:
        row = {"kind": "train", "step": step, "time": START_S + step, "loss": 5.0, "step_time_s": 0.5, "tokens_seen": 512 * step, **figures}
        storage.append_json_line(attempt.metrics_path, row)


def test_page_shows_the_figures_of_the_run_and_its_baselines(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    page = page_of(run)
    for figure in ("3.9000", "1.8800", f"{BASELINES['unigram']:.4f}", f"{BASELINES['bigram_kneser_ney']:.4f}", "-0.2600", "10.2k", "1.00k"):
        assert figure in page.said, figure
    last = read_curves(run).validations[-1]
    assert f"last {last['loss']:.4f}" in page.said
    assert "done" in page.said
    assert f"python -m factory_train export {run.name}" in page.said


def test_markdown_and_page_say_the_same(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    page, markdown = page_of(run), run.report_path.read_text()
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert len(titles) == len(page.all("h2"))
    assert all(title in page.said for title in titles)


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    page = page_of(run)
    assert not {"script", "link", "iframe", "img", "object", "base", "form"} & {name for name, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset"), tag
            assert not name.startswith("on"), tag
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), value
    assert "@import" not in page.text
    assert set(re.findall(r"url\((.)", page.text)) <= {"#"}
    assert "http" not in re.sub(r"https?://[\w./-]*w3\.org\S*", "", page.text)


def test_every_link_leads_to_one_place(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    page = page_of(run)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for _, attributes in page.tags if (attributes.get("href") or "").startswith("#")}
    assert {str(link)[1:] for link in links} | set(re.findall(r"url\(#([^)]*)\)", page.text)) <= set(ids)


def test_every_picture_has_words_and_every_table_heads(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    page = page_of(run)
    pictures = page.all("svg")
    assert len(pictures) == len(page.all("figure")) >= 5
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(str(picture["aria-label"])) > 30
    scopes = [attributes.get("scope") for attributes in page.all("th")]
    assert set(scopes) == {"col", "row"}
    assert page.all("html")[0]["lang"] == "en"
    images = re.findall(r"!\[(.*?)\]\((.*?)\)", run.report_path.read_text())
    assert len(images) == len(pictures)
    for words, path in images:
        assert words
        assert (run.path / path).is_file()


def test_colours_follow_light_and_dark(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    page = page_of(run)
    assert "prefers-color-scheme: dark" in page.text
    drawn = page.text.split("</style>")[1]
    used = set(re.findall(r"var\((--[a-z]+)\)", drawn))
    assert {"--ink", "--grid", "--blue", "--orange"} <= used
    light, dark = (set(re.findall(r"(--[a-z]+):", part)) for part in page.text.split("@media (prefers-color-scheme: dark)")[:2])
    assert used <= light & dark


@pytest.mark.parametrize("text", ["</td></table><script>alert(1)</script>", "<svg onload=x>&amp;", "a\x00b\x1b[31m", "\"' ``` |", "\ud800"])
def test_hostile_sample_is_shown_and_not_obeyed(tmp_path: Path, text: str) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 5)
    storage.append_json_line(attempt.metrics_path, {"kind": "sample", "step": 5, "time": START_S, "prompt": text, "text": f"{text} end"})
    page = page_of(run)
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = re.sub("[\x00-\x08\x0b-\x1f\ud800]", "\ufffd", text)
    assert f"{shown} end" in page.said
    assert not re.search("[\x00-\x08\x0b-\x1f]", page.text)


def test_hostile_words_of_errors_and_configuration_are_escaped(tmp_path: Path) -> None:
    run, attempt, config = new_run(tmp_path)
    config.data.path = "/data/<b>&x</b>"
    storage.write_atomic(attempt.config_path, dump_config(config))
    storage.write_json(attempt.path / "code.json", {"argv": ["recipe=llama_fsdp", "data.path=<i>x</i>"]})
    attempt.record_error({"rank": 0, "message": "<script>bad()</script>", "hint": "<u>"})
    attempt.write_verdict("failed-user", 2, step=None, reason="<b>because</b>")
    page = page_of(run)
    assert not {"script", "b", "i", "u"} & {name for name, _ in page.tags}
    assert "<script>bad()</script> on rank 0" in page.said
    assert "<script>" not in run.report_path.read_text()


def test_page_of_a_run_without_a_step_has_no_pictures(tmp_path: Path) -> None:
    run, _, _ = new_run(tmp_path)
    page = page_of(run)
    assert not page.all("svg")
    assert "0 of 20 steps" in page.said
    assert "Nothing was measured yet" in page.said


def test_run_under_way_is_reported_up_to_its_last_whole_row(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 12)
    with open(attempt.metrics_path, "a") as file:
        file.write('{"kind": "train", "step": 13, "lo')
    page = page_of(run)
    assert "12 of 20 steps" in page.said
    assert "Not evaluated yet; last validation at step 10" in page.said


def test_superseded_rows_are_in_no_figure_and_the_restart_is_marked(tmp_path: Path) -> None:
    run, attempt, config = new_run(tmp_path)
    train(attempt, 1, 15, shift=50.0)
    attempt.write_verdict("preempted", 75, step=15, reason="asked to stop")
    second = run.new_attempt(config)
    train(second, 11, 20)
    second.record_event("resume", step=10, checkpoint="step-00000010")
    curves = read_curves(run)
    assert curves.steps.tolist() == list(range(1, 21))
    assert (curves.figures["loss"][:10] > 50).all()
    assert (curves.figures["loss"][10:] < 10).all()
    assert curves.restarts == [(2, 10)]
    assert [row["step"] for row in curves.samples] == [10, 20]
    page = page_of(run)
    assert "Restarts continued from step 10." in page.said
    assert "checkpoint step-00000010" in page.said
    assert "attempt 1 preempted" in page.said


def test_breakdown_adds_up_to_the_time_of_the_steps(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    write_steps(attempt, range(1, 11), data_s=0.05, compute_s=0.25, reduce_s=0.1, optimizer_s=0.05, ckpt_stall_s=0.1)
    page = page_of(run)
    # 10 steps of 0.5 s, of which 0.05 s are none of the phases, and 0.1 s of waiting beside them.
    for part in ("waiting for data 8.3", "forward and backward 41.7", "gradient reduction 16.7", "rest of the step 8.3", "checkpoint 16.7"):
        assert part in page.said, part


def test_old_run_without_phases_says_so(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    page = page_of(run)
    assert "did not log the parts of a step" in page.said
    assert not (run.path / "report" / "breakdown.png").exists()


def test_pointing_at_a_plot_tells_its_figures(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    write_steps(attempt, range(1, 4))
    loss = next(plot for plot in draw_plots(read_facts(run), read_curves(run)) if plot.name == "loss")
    assert "<title>step 2, 1.02k tokens\ntraining 5 nats/token\nsmoothed 5</title>" in loss.svg


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    first, second = (draw_plots(read_facts(run), read_curves(run)) for _ in range(2))
    assert first == second


def test_thinning_keeps_the_extremes_and_both_ends() -> None:
    x, y = np.arange(100_000, dtype=float), np.sin(np.arange(100_000) / 7)
    y[70_001], y[123] = 50.0, -9.0
    kept, values = thinned(x, y, 400)
    assert len(kept) <= 402
    assert (values.max(), values.min()) == (50.0, -9.0)
    assert (kept[0], kept[-1]) == (0, 99_999)
    assert (np.diff(kept) > 0).all()


def test_bucket_means_count_what_is_not_there_as_nothing() -> None:
    edges = np.array([0.0, 2.0, 4.0])
    assert bucket_means(np.array([0.5, 1.5, 2.5, 3.5]), np.array([1.0, np.nan, 4.0, 2.0]), edges).tolist() == [0.5, 3.0]


def test_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    noise = np.random.default_rng(0).normal(5, 1, 20_000).tolist()
    with open(attempt.metrics_path, "w") as file:
        for step, loss in enumerate(noise, start=1):
            row = {"kind": "train", "step": step, "time": START_S + step, "loss": loss, "lr": 1e-3, "grad_norm": loss**2, "compute_s": 0.4}
            row |= {"tokens_seen": 512 * step, "tokens_per_s": 1e3 * loss, "step_time_s": 0.5, "ckpt_stall_s": 0.1, "skipped": 0}
            file.write(json.dumps(row) + "\n")
            if step % 10 == 0:
                validation = {"kind": "validation", "step": step, "time": START_S + step, "loss": loss, "bits_per_byte": 2.0}
                file.write(
                    json.dumps(validation) + "\n" + json.dumps(validation | {"kind": "sample", "prompt": "a", "text": "b" * 200}) + "\n"
                )
    write_report(run)
    assert html_report_path(run).stat().st_size < 1_500_000


def test_verb_writes_both_reports_of_a_run_that_is_named_by_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, attempt, _ = new_run(tmp_path, "7k2m9x")
    train(attempt, 1, 5)
    assert main(["7k2m9x", f"runs_root={tmp_path}"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert html_report_path(run).is_file()
    assert run.report_path.is_file()
    with pytest.raises(NotFoundError):
        main(["nowhere", f"runs_root={tmp_path}"])
