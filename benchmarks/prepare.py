"""`prepare` against `datasets.map` with the same tokenizer, on the same text, in one run.

    pip install datasets transformers
    python benchmarks/prepare.py [GB of text] [processes] [folder]

The text is that of this machine: all Python sources of the interpreter and its packages, a JSON line each, again and
again in another order until there is enough. It is divided into parts, and each way does each part in turn, so that
whatever else the machine does falls on both. Counted for `prepare`: everything, from starting the command to renamed
shards with hashes, indexes and statistics. Counted for `datasets`: `load_dataset("json")` and `map` to its end, in two
ways: with the tokenizer of `transformers`, as its documentation does it, and with `tokenizers` alone, which is faster;
documents end with an end-of-text in all of them. Dataset caches are cold, the page cache is warm.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PARTS = 4
VOCABULARY = 32768
SEED = 1


def write_corpus(folder: Path, num_bytes: int) -> list[Path]:
    """Writes `num_bytes` of text as JSON lines, in PARTS files."""
    roots = {sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]}
    sources = sorted({path for root in roots for path in Path(root).rglob("*.py")})
    texts = [text for path in sources if (text := path.read_text(errors="ignore")).strip()]
    order, files = random.Random(SEED), []
    for part in range(PARTS):
        path, written = folder / f"part-{part}.jsonl", 0
        with path.open("w") as file:
            while written < num_bytes // PARTS:
                order.shuffle(texts)
                for text in texts:
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text.encode())
                    if written >= num_bytes // PARTS:
                        break
        files.append(path)
    return files


def train_tokenizer(folder: Path, file: Path) -> Path:
    """Returns a folder with a byte-level BPE tokenizer, as GPT-2 has it."""
    from factory_train.data.tokenizer import Tokenizer

    with file.open() as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 2000)]
    tokenizer = Tokenizer.train("bpe", texts, (), VOCABULARY)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer" / "tokenizer.json")
    return folder / "tokenizer"


def prepare(file: Path, tokenizer: Path, work: Path, processes: int) -> int:
    """Returns the tokens that `prepare` makes of a file."""
    out = work / "prepared"
    words = [str(file), f"tokenizer={tokenizer}", f"workers={processes}", f"out={out}"]
    subprocess.run([sys.executable, "-m", "factory_train", "prepare", *words], check=True, capture_output=True)
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    return sum(split["num_tokens"] for split in splits.values())


def mapped(file: Path, tokenizer: Path, work: Path, processes: int, how: str) -> int:
    """Returns the tokens that `datasets.map` makes of a file, in a process of its own as `prepare` has one."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from prepare import map_here; map_here(*sys.argv[1:])"
    words = [str(file), str(tokenizer), str(work), str(processes), how]
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def map_here(file: str, tokenizer: str, work: str, processes: str, how: str) -> None:
    """Maps a file and prints the number of tokens."""
    import datasets

    dataset = datasets.load_dataset("json", data_files=file, cache_dir=work, split="train")
    options: dict[str, Any] = {"batched": True, "num_proc": int(processes), "remove_columns": ["text"]}
    encode = with_transformers(tokenizer) if how == "transformers" else with_tokenizers(tokenizer)
    result = dataset.map(encode, **options)
    # Apart from the lists, which say it too, nothing is read to count: Arrow knows where each list ends.
    print(sum(len(chunk.flatten()) for chunk in result.data.column("input_ids").chunks))


def with_transformers(folder: str) -> Callable[[dict[str, list[str]]], dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], return_attention_mask=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    return encode


def with_tokenizers(folder: str) -> Callable[[dict[str, list[str]]], dict[str, Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*encoding.ids, end] for encoding in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    return encode


def main(gigabytes: float, processes: int, folder: Path) -> dict[str, Any]:
    files = write_corpus(folder, int(gigabytes * 1e9))
    tokenizer = train_tokenizer(folder, files[0])
    ways: dict[str, Callable[[Path, Path], int]] = {
        "prepare": lambda file, work: prepare(file, tokenizer, work, processes),
        "datasets.map, tokenizers": lambda file, work: mapped(file, tokenizer, work, processes, "tokenizers"),
        "datasets.map, transformers": lambda file, work: mapped(file, tokenizer, work, processes, "transformers"),
    }
    seconds, tokens = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for number, file in enumerate(files):
        file.read_bytes()
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            work = folder / "work"
            work.mkdir()
            started = time.monotonic()
            tokens[name] += ways[name](file, work)
            seconds[name] += time.monotonic() - started
            shutil.rmtree(work)
            print(f"part {number}  {name:<28} {tokens[name] / seconds[name] / 1e6:.3f}M tokens/s so far", flush=True)
    rates = {name: tokens[name] / seconds[name] for name in ways}
    return {
        "command": f"python benchmarks/prepare.py {gigabytes:g} {processes}",
        "bytes_of_json": sum(file.stat().st_size for file in files),
        "processes": processes,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": rates,
        "ratio": {name: rates["prepare"] / rate for name, rate in rates.items() if name != "prepare"},
        "versions": {name: version(name) for name in ("tokenizers", "datasets", "transformers", "pyarrow")}
        | {"python": platform.python_version()},
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as scratch:
        gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
        print(json.dumps(main(gigabytes, int(sys.argv[2]) if len(sys.argv) > 2 else 2, Path(scratch)), indent=1))
