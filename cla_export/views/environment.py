"""Show a diagnosis in the terminal; reads the same without colour."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cla_export.environment import Diagnosis, Package

_STYLES = {"ready": "green", "builds only": "green", "missing": "yellow", "broken": "red"}


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the machine, the packages, and each target with what it still needs."""

    def line(text: str = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False)

    memory = "unknown" if diagnosis.memory is None else f"{diagnosis.memory / 1024**3:,.1f} GiB"
    line(f"cla-export {diagnosis.version}, Python {diagnosis.python}", "bold")
    line(f"  {diagnosis.executable}")
    line(f"  {diagnosis.platform}, {diagnosis.cpus} CPUs, {memory} memory")
    for gpu in diagnosis.gpus:
        line(f"  {gpu.name}, {gpu.memory}, driver {gpu.driver}")
    if not diagnosis.gpus:
        line(f"  no GPU: {diagnosis.gpu_note}")
    if not diagnosis.installed:
        line("  cla-export itself is not installed, so version ranges cannot be checked")
    line()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("package", "installed", "wanted", ""):
        table.add_column(title, overflow="fold")
    for package in diagnosis.packages:
        cells = (package.name, package.version or "-", package.wanted or "", _verdict(package))
        table.add_row(*map(Text, cells))  # as Text, brackets are not taken for markup
    console.print(table)
    if diagnosis.providers:
        line(f"ONNX Runtime was built with {', '.join(diagnosis.providers)}")
    line(
        f"fast attention on CPUs: {diagnosis.fast_cpu_note}", "" if diagnosis.fast_cpu else "yellow"
    )
    line()
    for target in diagnosis.targets:
        line(f"{target.name}: {target.state}", _STYLES[target.state])
        for need in target.needs:
            line(f"  - {need}")
        if target.install is not None:
            command = Text(f"  get it: {target.install}")
            console.print(command, soft_wrap=True)  # in one piece, to be copied


def _verdict(package: Package) -> str:
    if package.error is not None:
        return f"does not load: {package.error}"
    if package.version is None:
        return "" if package.extra is None else f"optional: [{package.extra}]"
    if package.in_range is False:
        return "out of range"
    return "ok"
