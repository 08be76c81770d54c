"""The commands, their options, and what becomes of errors.

In: arguments. Out: an exit code: 0; 1 when `check` finds an error, or when the reader of our output has gone; 2 after
an error; 130 after Ctrl-C. Each command's work is done by the module of its name. Called by cli.main.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera import __version__, env
from tessera.cli.options import ModelOptions, SamplingOptions

_Misuse: Any = typer.BadParameter.__base__  # of every error that typer raises for wrong arguments

app = typer.Typer(
    name="tessera", add_completion=False, no_args_is_help=True, rich_markup_mode=None,
    help="Generate text with decoder-only transformers, and inspect and convert their files.")


def _set_debug(wanted: bool) -> bool:
    if wanted:
        os.environ["TESSERA_DEBUG"] = "1"
    return wanted


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tessera {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A model folder, a GGUF file, or smollm2.")]
Dtype = Annotated[str, typer.Option(help="f32, bf16, f16 or auto: bf16 where the processor multiplies it, else f32.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with; default torch's choice.")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="Bring quantized weights to --dtype on loading.")]
Tp = Annotated[int, typer.Option(help="Tensor-parallel ranks.")]
System = Annotated[str | None, typer.Option(help="The system message of the chat.")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Default 256, or what fits.")]
Temperature = Annotated[float, typer.Option(help="Logits are divided by it; 0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability together.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens of the text so far become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text to end at; may be given several times.")]


@app.callback()
def _root(
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; default: stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file; - is stdin.")] = None,
    model: Model = "smollm2",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message: apply the chat template.")] = False,
    system: System = None,
    stream: Annotated[bool | None, typer.Option(
        "--stream/--no-stream", help="Print text as it is made; default on a terminal.")] = None,
    json: Json = False,
    max_new_tokens: MaxNewTokens = None, temperature: Temperature = 0.2, top_k: TopK = 50, top_p: TopP = 0.9,
    min_p: MinP = 0.0, greedy: Greedy = False,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search; sampling options have no effect.")] = 1,
    repetition_penalty: Penalty = 1.0, seed: Seed = None, stop: Stop = None,
    dtype: Dtype = "auto", threads: Threads = None, tp: Tp = 1,
    dequantize: Dequantize = False, debug: Debug = False,
) -> None:
    """Continue a prompt; prints the new text."""
    from tessera.cli import generate as command

    command.run(
        ModelOptions(path=model, dtype=dtype, threads=threads, tp=tp, dequantize=dequantize),
        SamplingOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            greedy=greedy, num_beams=num_beams, repetition_penalty=repetition_penalty, seed=seed, stop=stop),
        prompt=prompt, file=file, chat=chat, system=system, stream=stream, as_json=json)


@app.command()
def chat(
    model: Model = "smollm2", system: System = None,
    max_new_tokens: MaxNewTokens = None, temperature: Temperature = 0.2, top_k: TopK = 50, top_p: TopP = 0.9,
    min_p: MinP = 0.0, greedy: Greedy = False, repetition_penalty: Penalty = 1.0, seed: Seed = None,
    stop: Stop = None, dtype: Dtype = "auto", threads: Threads = None, tp: Tp = 1,
    dequantize: Dequantize = False, debug: Debug = False,
) -> None:
    """Talk with a model; /help lists the commands."""
    if tp > 1:
        from tessera.cli.chat_ranks import run
    else:
        from tessera.cli.chat import run
    run(
        ModelOptions(path=model, dtype=dtype, threads=threads, tp=tp, dequantize=dequantize),
        SamplingOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            greedy=greedy, repetition_penalty=repetition_penalty, seed=seed, stop=stop),
        system=system)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="A model folder, a GGUF file, or smollm2.")],
    context: Annotated[int | None, typer.Option(help="Tokens to size the cache for; default the model's most.")] = None,
    batch: Annotated[int, typer.Option(help="Rows to size the cache for.")] = 1,
    json: Json = False, debug: Debug = False,
) -> None:
    """Describe a model file without loading its weights."""
    from tessera.cli import info as command

    command.run(path, context=context, batch=batch, as_json=json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A GGUF file, a model folder, or smollm2.")],
    target: Annotated[Path, typer.Argument(help="The folder, or the .gguf file, to write.")],
    kind: Annotated[str | None, typer.Option("--type", "-t", help=(
        "How weights are stored: f32, f16, bf16, and in GGUF files q8_0, q4_0, q4_1; "
        "default bf16 in folders, f16 in GGUF files."))] = None,
    debug: Debug = False,
) -> None:
    """Convert a GGUF file to a Hugging Face folder, or a folder to a GGUF file."""
    from tessera.cli import convert as command

    command.run(source, target, kind=kind)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=(
        "gpt-120b, gpt-175b, llama3-8b, llama3-70b, llama3-405b, smollm2, a model's path, or a JSON file with a "
        "configuration."))] = "gpt-120b",
    machine: Annotated[str, typer.Option(help="a100, h100, h200, nvl72, gb300, or cpu: this one, measured.")] = "nvl72",
    devices: Annotated[int, typer.Option("--devices", "-d", help="How many of the machine's devices.")] = 72,
    inference: Annotated[bool, typer.Option("--inference", help="Plan generation; default training.")] = False,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step, default 256; or requests, default 1.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence, or of a prompt.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each request.")] = 128,
    matmul_dtype: Annotated[str, typer.Option(help="Of training's matmuls: bf16, fp8, ...; default the model's.")] = "",
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks; here and below, default the fastest.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    virtual_stages: Annotated[int | None, typer.Option(help="Pieces of the model on a pipeline rank.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences of one pass.")] = None,
    recompute: Annotated[str | None, typer.Option(help="none, selective or full.")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.")] = None,
    top: Annotated[int, typer.Option(help="Shapes to show.")] = 5,
    check: Annotated[bool, typer.Option("--check", help="Compare with published figures instead.")] = False,
    json: Json = False, debug: Debug = False,
) -> None:
    """Choose a mesh for a model: memory and time on machines that need not be there."""
    from tessera.cli import plan as command

    if check:
        command.check(as_json=json)
        return
    command.run(command.PlanOptions(
        model=model, machine=machine, devices=devices, inference=inference, batch=batch, seq_len=seq_len,
        new_tokens=new_tokens, matmul_dtype=matmul_dtype, tp=tp, pp=pp, dp=dp, virtual_stages=virtual_stages,
        micro_batch=micro_batch, recompute=recompute, zero=zero, top=top), as_json=json)


@app.command()
def check(
    targets: Annotated[list[str], typer.Argument(metavar="FILE|MODULE...", help="Python files, modules or packages.")],
    json: Json = False, debug: Debug = False,
) -> int:
    """Check the shapes in every ts.function and ts.kernel, without data; exit code 1 when there is an error.

    The code is imported, and functions run on tensors without data: check what you would run.
    """
    from tessera.cli import check as command

    return command.run(targets, as_json=json)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def launch(
    script: Annotated[str, typer.Argument(help="A Python script; it calls ts.init() to join the job.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on this host.")] = 1,
    threads: Threads = None, debug: Debug = False,
) -> int:
    """Run a script as several ranks of one job; they end together, and the one that failed is named."""
    from tessera import dist

    return dist.launch(script, args or [], nproc, threads)


@app.command(name="env")
def environment(json: Json = False, debug: Debug = False) -> None:
    """List the environment variables that Tessera reads, and their values."""
    from tessera.cli import environment as command

    command.run(as_json=json)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default sys.argv.

    Returns:
        The exit code.
    """
    try:
        code = app(list(sys.argv[1:] if arguments is None else arguments), prog_name="tessera", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is buffered still cannot be written; the interpreter must not try once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if env.get("TESSERA_DEBUG"):
            traceback.print_exc()
        else:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _one_line(error: Exception) -> str:
    """What is wrong, for a user: our own errors and the system's as they are, others with their kind."""
    from tessera.errors import TesseraError

    if isinstance(error, _Misuse):
        text = error.format_message() + " (see --help)"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, TesseraError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split())
