"""`tessera generate`: what it prints is what the engine generates; options, sources of prompts, errors."""

from __future__ import annotations

import io
import json

import pytest

import tessera as ts


@pytest.fixture(scope="module")
def expected(model_folder):
    """`expected(ids, **options)` -> the engine's own result."""
    engine = ts.GPTInference(ts.load_model(model_folder))
    tokenizer = ts.load_tokenizer(model_folder)

    def generate(text, **options):
        ids = tokenizer.encode(text) if isinstance(text, str) else tokenizer.apply_chat_template(text)
        return engine.generate_detailed([ids], tokenizer=tokenizer, **options)

    return generate


def _stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_greedy_text(tessera, model_folder, expected, stream):
    code, out, err = tessera("generate", "-m", model_folder, "--dtype", "f32", "--greedy", "-n", 9, stream, "héllo")
    assert (code, err) == (0, "")
    assert out == expected("héllo", max_new_tokens=9, do_sample=False).texts[0] + "\n"


def test_sampling_options_reach_the_engine(tessera, model_folder, expected):
    options = {"temperature": 1.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 5}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    code, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 20, *flags, "abc")
    assert code == 0
    assert out == expected("abc", max_new_tokens=20, **options).texts[0] + "\n"
    other = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 20, *flags[:-1], 6, "abc")[1]
    assert other != out


def test_beams(tessera, model_folder, expected):
    _, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 6, "--num-beams", 3, "abc")
    assert out == expected("abc", max_new_tokens=6, num_beams=3).texts[0] + "\n"


def test_chat_template(tessera, model_folder, expected):
    _, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 6, "--greedy", "--chat",
                        "--system", "Be brief.", "Hello")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert out == expected(chat, max_new_tokens=6, do_sample=False).texts[0] + "\n"


def test_stop_text(tessera, model_folder, expected):
    whole = expected("abc", max_new_tokens=12, do_sample=False).texts[0]
    stop = whole[3:5]
    _, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 12, "--greedy", "--stop", stop, "abc")
    assert out == whole[:whole.index(stop)] + "\n"


def test_json(tessera, model_folder, expected):
    _, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 7, "--greedy", "--json", "abcd")
    report, wanted = json.loads(out), expected("abcd", max_new_tokens=7, do_sample=False)
    assert report["text"] == wanted.texts[0]
    assert report["prompt_tokens"] == 4
    assert report["new_tokens"] == len(wanted.new_tokens[0])
    assert report["finish_reason"] == wanted.finish_reasons[0]
    assert report["dtype"] == "f32"
    assert report["generate_seconds"] > 0 and report["load_seconds"] > 0


@pytest.mark.parametrize("source", ["argument", "file", "stdin", "dash"])
def test_prompt_sources(tessera, model_folder, expected, source, tmp_path, monkeypatch):
    text = "ünd\nline two\n"
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    _stdin(monkeypatch, text.encode())
    where = {"argument": [text], "file": ["--file", path], "stdin": [], "dash": ["-f", "-"]}[source]
    code, out, _ = tessera("generate", "-m", model_folder, "--dtype", "f32", "-n", 5, "--greedy", *where)
    assert (code, out) == (0, expected(text, max_new_tokens=5, do_sample=False).texts[0] + "\n")


def test_default_length_fits_the_context(tessera, model_folder):
    _, out, _ = tessera("generate", "-m", model_folder, "--json", "--greedy", "x" * 120)
    assert json.loads(out)["new_tokens"] <= 8


@pytest.mark.parametrize("arguments, words", [
    (["-n", "0", "a"], ["max_new_tokens", "0"]),
    (["-n", "125", "a" * 10], ["max_new_tokens", "118"]),
    (["a" * 128], ["128 tokens", "max_seq_len"]),
    (["--temperature", "-1", "a"], ["temperature", "-1"]),
    (["--temperature", "nan", "a"], ["temperature", "nan"]),
    (["--top-p", "0", "a"], ["top_p", "(0, 1]"]),
    (["--top-p", "1.5", "a"], ["top_p", "1.5"]),
    (["--top-k", "-2", "a"], ["top_k", "-2"]),
    (["--num-beams", "0", "a"], ["num_beams", "0"]),
    (["--num-beams", "1000", "a"], ["num_beams", "1000"]),
    (["--dtype", "int3", "a"], ["dtype", "int3"]),
    (["--threads", "0", "a"], ["--threads", "0"]),
    (["--tp", "0", "a"], ["--tp", "0", "at least 1"]),
    (["--json", "--stream", "a"], ["--stream", "--json"]),
    (["--stream", "--num-beams", "2", "a"], ["--stream", "--num-beams"]),
    (["--system", "x", "a"], ["--system", "--chat"]),
    ([""], ["prompt", "''"]),
    (["-f", "/nowhere/prompt", "a"], ["prompt", "twice"]),
    (["-f", "/nowhere/prompt"], ["--file", "/nowhere/prompt"]),
    (["-n", "many", "a"], ["--max-new-tokens", "integer"]),
    (["--no-such", "a"], ["--no-such"]),
])
def test_bad_input_is_one_line(tessera, model_folder, arguments, words):
    code, out, err = tessera("generate", "-m", model_folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("data, word", [(b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_bad_stdin(tessera, model_folder, monkeypatch, data, word):
    _stdin(monkeypatch, data)
    code, _, err = tessera("generate", "-m", model_folder)
    assert code == 2 and word in err


@pytest.mark.parametrize("name", ["missing", "empty", "unknown", "damaged"])
def test_bad_model_path(tessera, tmp_path, name):
    path = tmp_path / name
    words = {"missing": "nothing at", "empty": "config.json", "unknown": "llama, mistral", "damaged": "damaged.gguf"}
    if name == "damaged":
        path = path.with_suffix(".gguf")
        path.write_bytes(b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f")
    elif name != "missing":
        path.mkdir()
    if name == "unknown":
        (path / "config.json").write_text('{"model_type": "mamba"}')
    code, out, err = tessera("generate", "-m", path, "a")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words[name] in err


def test_debug_shows_the_trace(tessera):
    code, _, err = tessera("generate", "--debug", "-m", "/nowhere", "a")
    assert code == 2
    assert "Traceback" in err and "NotFoundError" in err
