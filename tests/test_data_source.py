"""Where text comes from, how it is divided, and what is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factory_train.config import DataConfig
from factory_train.data import source
from factory_train.data.source import check_source, read_source
from factory_train.errors import ConfigError, DataError, ExitCode, FactoryTrainError


def text_config(path: Path, text: str | bytes, **settings: Any) -> DataConfig:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return DataConfig(path=str(path), **settings)


def refusal(config: DataConfig, seq_len: int = 8) -> FactoryTrainError:
    with pytest.raises(FactoryTrainError) as caught:
        check_source(config, seq_len)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_builtin_corpus_is_the_standard_library_without_tests_or_installed_packages() -> None:
    names = [row["name"] for row in read_source(DataConfig()).manifest]
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert {"json/decoder.py", "pydoc_data/topics/assert"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert "pydoc_data/topics.py" not in names


def test_builtin_split_is_by_file_and_a_fixed_function_of_the_name() -> None:
    first, second = read_source(DataConfig()), read_source(DataConfig())
    train, validation = ({document.name for document in first.splits[split]} for split in source.SPLITS)
    assert not train & validation
    assert train | validation == {row["name"] for row in first.manifest}
    assert 0.03 < len(validation) / len(first.manifest) < 0.08
    assert first == second
    # A larger held-out part contains the smaller one: no file moves from validation to training.
    assert validation < {document.name for document in read_source(DataConfig(validation_fraction=0.2)).splits["validation"]}


def test_text_file_is_cut_at_the_character_where_nanogpt_cuts_it(tmp_path: Path) -> None:
    text = "añb\r\n🙂" * 1003
    splits = read_source(text_config(tmp_path / "a.txt", text, validation_fraction=0.1)).splits
    cut = int(len(text) * 0.9)
    assert splits["train"][0].text == text[:cut]
    assert splits["validation"][0].text == text[cut:]


def test_checking_a_request_loads_no_heavy_package() -> None:
    code = (
        "import sys; from factory_train.config import DataConfig; from factory_train.data.source import check_source;"
        "from factory_train.data.catalog import find_prepared; from pathlib import Path;"
        "check_source(DataConfig(), 256); find_prepared(DataConfig(), Path('/nonexistent'));"
        "print([name for name in ('torch', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_good_requests_pass(tmp_path: Path) -> None:
    check_source(DataConfig(), 2048)
    check_source(text_config(tmp_path / "a.txt", "hello world\n" * 100, tokenizer="char"), 32)


def test_text_without_a_path_is_refused() -> None:
    assert isinstance(refusal(DataConfig(name="text")), ConfigError)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0])
def test_impossible_validation_fraction_is_refused(fraction: float) -> None:
    assert refusal(DataConfig(validation_fraction=fraction)).where == "data.validation_fraction"


def test_bpe_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    error = refusal(DataConfig(vocab_size=256))
    assert "data.vocab_size=257" in str(error)
    check_source(DataConfig(vocab_size=257), 8)


def test_missing_file_folder_empty_and_special_file_are_refused(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(DataConfig(path=str(tmp_path / "none.txt"))))
    assert "folder" in str(refusal(DataConfig(path=str(tmp_path))))
    assert "empty" in str(refusal(text_config(tmp_path / "empty.txt", "")))
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in str(refusal(DataConfig(path=str(tmp_path / "pipe"))))


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    config = text_config(file, "hello\n" * 100)
    file.chmod(0)
    child = os.fork()
    if child == 0:
        # Nothing but permission separates root from the file, so the check runs as somebody else.
        code = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            check_source(config, 8)
        except DataError as error:
            code = 0 if "cannot be read: Permission denied" in str(error) and "chmod" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("junk", "says"), [(b"\0", "NUL byte"), (b"\xff", "byte 0xff"), (b"\xe9t\xe9", "byte 0xe9")])
def test_binary_file_is_refused_with_the_byte_offset(tmp_path: Path, junk: bytes, says: str) -> None:
    error = refusal(text_config(tmp_path / "a.bin", b"x" * 1000 + junk + b"x" * 1000))
    assert says in str(error)
    assert "at offset 1,000" in str(error)


@pytest.mark.parametrize("place", ["head", "middle", "tail"])
def test_large_file_is_sampled_at_head_middle_and_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(source, "FULL_CHECK_BYTES", 1000)
    monkeypatch.setattr(source, "SAMPLE_BYTES", 100)
    # Of odd length: samples begin and end inside characters.
    clean = ("é🙂" * 500 + "x").encode()
    check_source(text_config(tmp_path / "a.txt", clean), 8)
    # Each pair of characters has six bytes: these are first bytes of a character.
    offset = {"head": 12, "middle": 1530, "tail": 3000}[place]
    data = bytearray(clean)
    data[offset] = 0xFF
    assert f"at offset {offset:,}" in str(refusal(text_config(tmp_path / "b.txt", bytes(data))))


def test_context_longer_than_the_data_names_the_split_and_a_length_that_passes(tmp_path: Path) -> None:
    config = text_config(tmp_path / "a.txt", "é" * 400, tokenizer="char", validation_fraction=0.1)
    error = refusal(config, seq_len=64)
    assert "context is longer than the data" in str(error)
    assert "validation part has 40 characters" in str(error)
    assert "train.seq_len=39" in str(error.fix)
    check_source(config, 39)
    # The same text has twice as many bytes, which is how many tokens it may have at most.
    config.tokenizer = "byte"
    check_source(config, 79)
    assert "80 bytes" in str(refusal(config, seq_len=80))


def test_context_longer_than_the_builtin_corpus_is_refused() -> None:
    assert "context is longer than the data" in str(refusal(DataConfig(), seq_len=10**9))


def test_one_character_is_too_little_for_any_context(tmp_path: Path) -> None:
    assert "longer text" in str(refusal(text_config(tmp_path / "a.txt", "x"), seq_len=1).fix)
