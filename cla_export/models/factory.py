"""What `--module package.module:factory` names: found, called, and asked for a module.

The code that is imported is the one that the user named; nothing in a model folder is.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib import import_module
from inspect import Parameter, signature

from torch import nn

from cla_export.errors import BadInput

ARGUMENTS = ("input_ids", "position_ids")


def find_factory(name: str) -> Callable[..., object]:
    """Import `package.module:factory`.

    Raises:
        BadInput: the name is of another form, or there is no such module or function.
    """
    path, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise BadInput(
            f"--module is {name!r}; expected package.module:factory, such as my_code.model:make"
        )
    try:
        found = getattr(import_module(path), attribute, None)
    except Exception as error:
        raise BadInput(
            f"--module {name}: {path} cannot be imported ({type(error).__name__}: {error}); it has "
            "to be installed, in the current folder, or on PYTHONPATH"
        ) from error
    if not callable(found):
        there = "is no function" if found is not None else "is not there"
        raise BadInput(
            f"--module {name}: {attribute} {there} in {path}; expected a function "
            "factory(config: dict) -> torch.nn.Module"
        )
    made: Callable[..., object] = found
    return made


def make_module(
    name: str, factory: Callable[..., object], config: Mapping[str, object]
) -> nn.Module:
    """Call a factory with a config of its own; the module, in evaluation mode.

    Raises:
        BadInput: it fails, returns something else, or the module's forward takes other arguments.
    """
    try:
        module = factory(deepcopy(dict(config)))
    except Exception as error:
        raise BadInput(
            f"--module {name}: the factory failed on config.json ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(module, nn.Module):
        raise BadInput(
            f"--module {name}: the factory returned a {type(module).__name__}; expected a "
            "torch.nn.Module"
        )
    wanted = signature(module.forward).parameters
    loose = Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL
    needed = [
        key for key, p in wanted.items() if p.default is Parameter.empty and p.kind not in loose
    ]
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in wanted.values())
    if set(needed) - set(ARGUMENTS) or not (takes_any or set(ARGUMENTS) <= set(wanted)):
        raise BadInput(
            f"--module {name}: forward of {type(module).__name__} takes ({', '.join(wanted)}); "
            "expected forward(input_ids, position_ids) -> logits, by these names"
        )
    return module.eval()
