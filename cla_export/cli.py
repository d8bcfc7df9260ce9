"""The command line: each command parses, calls one public function, renders. Thin on purpose.

Results go to standard output (as JSON with --json), everything else to standard error. Exit codes:
0 done, 1 a check failed, 2 bad input, 3 a missing package or device, 130 interrupted.
"""

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import cla_export
from cla_export.errors import BadInput, CheckFailed, ClaExportError

if TYPE_CHECKING:
    from rich.console import Console

    from cla_export.bundle import Progress

app = typer.Typer(
    name="cla-export",
    help="Deploy decoders with cross-layer KV sharing: export, prove, run. One cache per group.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Target(StrEnum):
    """What a graph is lowered for."""

    onnxruntime = "onnxruntime"
    portable = "portable"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class EngineTarget(StrEnum):
    """TensorRT's flavours."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class AttentionChoice(StrEnum):
    """What computes attention in a TensorRT engine."""

    auto = "auto"
    native = "native"
    plugin = "plugin"


class DType(StrEnum):
    """Dtype of weights, activations and caches."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Quantize(StrEnum):
    """Weight-only quantisation."""

    int4 = "int4"
    int8 = "int8"


class ParityTarget(StrEnum):
    """What runs a bundle that is compared with PyTorch."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Backend(StrEnum):
    """What runs a bundle."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    torch = "torch"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Source = Annotated[Path, typer.Argument(help="Model folder: config.json, model.safetensors, ...")]
BundleFolder = Annotated[Path, typer.Argument(help="Bundle folder, as export writes it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Threads = Annotated[int | None, typer.Option(help="Intra-operator threads; onnxruntime.")]
EngineFolder = Annotated[
    Path | None, typer.Option(help="TensorRT engine's folder, where the bundle has several.")
]


def main() -> None:
    """Entry point: turns our exceptions into messages and exit codes."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except ClaExportError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        _console(stderr=True).print("interrupted; nothing was left half-written")
        raise SystemExit(130) from None


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt  # unwinds, so that temporary folders go


def _version(wanted: bool) -> None:  # Typer's callback form
    if wanted:
        typer.echo(f"cla-export {cla_export.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: cla-export inspect my-model")
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A config, a model folder, an .onnx file, a bundle.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show which layers share a cache, and what sharing saves against the dense twin."""
    from cla_export.views.inspection import render

    found = cla_export.inspect(path)
    _show(found.to_json()) if as_json else render(found, _console())
    if not found.ok:
        raise CheckFailed(f"{path}: not what it says it is; see the failed checks above")


@app.command(epilog="Example: cla-export export my-model my-bundle --target onnxruntime")
def export(
    source: Source,
    dest: Annotated[Path, typer.Argument(help="Folder to create.")],
    target: Annotated[
        Target, typer.Option(help="What to lower the graph for.")
    ] = Target.onnxruntime,
    dtype: Annotated[DType, typer.Option(help="Weights, activations and caches.")] = DType.fp32,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Weights alone, in blocks of 32; target onnxruntime.")
    ] = None,
    attention: Annotated[
        AttentionChoice | None,
        typer.Option(help="TensorRT targets: its own kernels, or the fused plugin."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a model folder to a bundle: an ONNX graph with one KV cache per layer group."""
    with _progress() as progress:
        bundle = cla_export.export(
            source,
            dest,
            target=target.value,
            dtype=dtype.value,
            quantize=None if quantize is None else quantize.value,
            attention=None if attention is None else attention.value,
            force=force,
            progress=progress,
        )
    if as_json:
        _show(dict(bundle.manifest))
        return
    console = _console()
    console.print(f"[bold green]exported[/] {dest}: {bundle.layout.describe()}", highlight=False)
    own, dense = (
        layout.bytes_per_token(bundle.dtype)
        for layout in (bundle.layout, bundle.layout.dense_twin())
    )
    console.print(
        f"  {bundle.target}, {bundle.arithmetic}; KV cache {own:,} bytes per token, {dense:,} "
        "without sharing",
        highlight=False,
    )
    for reason in bundle.attention_choices():
        console.print(f"  {reason}", highlight=False)


@app.command(epilog="Example: cla-export rewrite stateless.onnx stateful.onnx")
def rewrite(
    source: Annotated[
        Path, typer.Argument(help="ONNX file: input_ids, position_ids -> logits; no caches.")
    ],
    dest: Annotated[Path, typer.Argument(help="File to write; weights go to DEST.data.")],
    target: Annotated[
        Target, typer.Option(help="What to lower the graph for.")
    ] = Target.onnxruntime,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run both graphs and compare them.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a graph that somebody else traced one KV cache per group; sharing is discovered."""
    done = cla_export.rewrite_graph(source, dest, target=target.value, check=check, force=force)
    if as_json:
        _show(done.to_json())
        return
    console = _console()
    console.print(f"[bold green]rewritten[/] {dest}: {done.layout.describe()}", highlight=False)
    operators = ", ".join(dict.fromkeys(done.attention))
    console.print(f"  {done.target}; caches are read by {operators}", highlight=False)
    if done.error is not None:
        console.print(
            f"  a prompt and single steps against the stateless graph: logits within "
            f"{done.error:.1e}, the largest is {done.largest:.3g}",
            highlight=False,
        )


@app.command(epilog="Example: cla-export build my-bundle --compute-capability '8.6 8.9 12.0'")
def build(
    bundle: BundleFolder,
    target: Annotated[
        EngineTarget | None, typer.Option(help="Flavour; by default the bundle's target.")
    ] = None,
    precision: Annotated[
        DType | None, typer.Option(help="Checked against the bundle's dtype, which decides.")
    ] = None,
    capacity: Annotated[int | None, typer.Option(help="Tokens a slot holds.")] = None,
    slots: Annotated[int, typer.Option(help="Rows side by side in decode.")] = 8,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a prefill call, at most.")] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: GPUs to build for, such as '8.9 12.0'; repeatable."),
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave weights out.")] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later versions too.")
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="File, read and updated.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Build a TensorRT engine from a bundle that was exported for it."""
    with _progress() as progress:
        built = cla_export.build(
            bundle,
            flavour=None if target is None else target.value,
            precision=None if precision is None else precision.value,
            capacity=capacity,
            slots=slots,
            chunk=chunk,
            compute_capabilities=tuple(
                name
                for given in compute_capability or ()
                for name in given.replace(",", " ").split()
            ),
            refit=refit,
            strip=strip,
            weight_streaming=weight_streaming,
            version_compatible=version_compatible,
            timing_cache=None if timing_cache is None else str(timing_cache),
            force=force,
            progress=progress,
        )
    if as_json:
        _show({"folder": str(built.folder), **built.record})
        return
    console, record = _console(), built.record
    console.print(f"[bold green]built[/] {built.folder}", highlight=False)
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    console.print(
        f"  {record['engine']['bytes']:,} bytes in {record['seconds']:.1f} s, at most "
        f"{record['peak_bytes'] / 2**20:,.0f} MiB of memory; {versions}. Built here, not run here",
        highlight=False,
    )


@app.command(epilog="Example: cla-export parity my-bundle --report parity-report")
def parity(
    bundle: BundleFolder,
    reference: Annotated[Path | None, typer.Option(help="Model folder to compare with.")] = None,
    target: Annotated[
        ParityTarget | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for JSON, JUnit, Markdown, HTML.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text for prompts and perplexity.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the cases' shapes, and of random prompts.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="parity.json of an earlier run: fail also on what was better then."),
    ] = None,
    debug_dir: Annotated[
        Path | None,
        typer.Option(help="On failure, leave the first wrong call here, for polygraphy to replay."),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prove a bundle equal to its PyTorch model; exit 1 if it is not, 3 if it cannot run here."""
    from cla_export.compare.files import failure, write_report
    from cla_export.views.parity import render

    with _progress() as progress:
        found = cla_export.parity(
            bundle,
            reference,
            target=None if target is None else target.value,
            engine=engine,
            text=text,
            threads=threads,
            baseline=baseline,
            debug_dir=debug_dir,
            progress=progress,
            **({} if seed is None else {"seed": seed}),
        )
    if report is not None:
        write_report(found, report)
    _show(found.to_json()) if as_json else render(found, _console())
    if not found.passed:
        raise CheckFailed(f"{bundle}: {failure(found)}")


@app.command(epilog='Example: cla-export generate my-bundle "In the beginning" -n 64')
def generate(
    bundle: BundleFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="New tokens at most.")] = 64,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: probability mass kept.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, streaming the text."""
    from cla_export.sampling import Sampler

    model = cla_export.load(
        bundle, backend=None if backend is None else backend.value, engine=engine, threads=threads
    )
    pieces = model.stream(prompt, tokens, Sampler(temperature, top_p, seed))
    if as_json:
        _show({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(epilog="Example: cla-export plan my-model --memory 16GiB --context 8192")
def plan(
    source: Annotated[Path, typer.Argument(help="Model folder, or its config.json.")],
    memory: Annotated[str, typer.Option(help="Memory for weights and caches, such as 16GiB.")],
    context: Annotated[int, typer.Option(help="Tokens each slot must hold.")],
    batch: Annotated[int | None, typer.Option(help="Slots wanted side by side.")] = None,
    dtype: Annotated[DType, typer.Option(help="Weights and caches.")] = DType.bf16,
    plot: Annotated[Path | None, typer.Option(help="Draw slots by context: .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which KV layouts fit a memory budget, and how many slots each leaves room for."""
    from cla_export.views import planning as planning_view

    found = cla_export.plan(source, memory=memory, context=context, batch=batch, dtype=dtype.value)
    if plot is not None:
        planning_view.plot(found, plot)
    _show(found.to_json()) if as_json else planning_view.render(found, _console())


@app.command(epilog="Example: cla-export bench my-bundle --batch 1,8 --context 512,2048")
def bench(
    bundle: BundleFolder,
    batch: Annotated[str, typer.Option(help="Rows side by side, in decode.")] = "1,8",
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens that each row holds before it decodes; 512,8192 where the model allows."
        ),
    ] = None,
    phase: Annotated[str, typer.Option(help="What to measure.")] = "decode,prefill",
    steps: Annotated[int, typer.Option(help="Decode steps to time.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens that prefill reads.")] = 512,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw decode steps by context: .png or .svg.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run's JSON: fail on what was faster then.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time decode steps and prefill, beside the time that memory needs to deliver what they read.

    Batches, contexts and phases are lists with commas. Exit 1 if something was faster in the run
    that --compare names.
    """
    from cla_export import benchmark
    from cla_export.bundle import write_json
    from cla_export.views import benchmark as benchmark_view

    batches = _numbers("--batch", batch)
    contexts = None if context is None else _numbers("--context", context)
    old = None if compare is None else benchmark.read_bench(compare)
    for file in (output, markdown, plot):
        if file is not None and not file.parent.is_dir():
            raise BadInput(f"{file}: there is no folder {file.parent}; make it first")
    if plot is not None:
        benchmark_view.check_plot(plot)
    with _progress() as progress:
        found = cla_export.bench(
            bundle,
            batches=batches,
            contexts=contexts,
            phases=phase.split(","),
            steps=steps,
            prompt=prompt,
            backend=None if backend is None else backend.value,
            engine=engine,
            threads=threads,
            progress=progress,
        )
    found = replace(found, command=shlex.join(["cla-export", *sys.argv[1:]]))
    _show(found.to_json()) if as_json else benchmark_view.render(found, _console())
    if output is not None:
        write_json(output, found.to_json())
    if markdown is not None:
        markdown.write_text(benchmark_view.markdown(found), encoding="utf-8")
    if plot is not None:
        benchmark_view.plot(found, plot)
    if old is not None:
        compared = benchmark.compare(found, old)
        for note in compared.notes:
            _console(stderr=True).print(f"note: {_escape(note)}", highlight=False)
        if compared.regressions:
            raise CheckFailed(f"slower than {compare}\n" + "\n".join(compared.regressions))


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Make the link that TensorRT-RTX's wheel lacks.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, and what each target would need."""
    from cla_export import environment
    from cla_export.views.environment import render

    for done in environment.fix() if fix else []:
        _console(stderr=True).print(f"made {_escape(done)}", highlight=False)
    found = cla_export.doctor()
    _show(found.to_json()) if as_json else render(found, _console())


@app.command(epilog="Example: cla-export demo my-demo-bundle")
def demo(
    dest: Annotated[Path, typer.Argument(help="Bundle folder to write.")] = Path("demo-bundle"),
    force: Force = False,
) -> None:
    """Run the main job on the model that ships here: inspect, export, parity, generate."""
    source, prompt = cla_export.demo_checkpoint(), "And it came to pass"
    _announce(f"inspect {source}")
    inspect(source)
    _announce(f"export {source} {dest}")
    export(source, dest, force=force)
    _announce(f"parity {dest}")
    parity(dest)
    _announce(f'generate {dest} "{prompt}" -n 96 --temperature 0.7 --seed 3')
    generate(dest, prompt, tokens=96, temperature=0.7, seed=3)


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers of a list such as `1,8`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"{option} is {text!r}; expected whole numbers with commas between, such as 1,8"
        ) from error


def _announce(command: str) -> None:
    _console().print(f"\n[bold cyan]$ cla-export {_escape(command)}[/]", highlight=False)


def _show(content: object) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A progress bar on standard error where that is a terminal, silence elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = _console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("start", total=None)

        def update(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield update


if __name__ == "__main__":
    main()
