"""Be called before and after a module, compiled or not."""

from collections.abc import Callable

from torch import nn

CALL = "_compiled_call_impl"  # what torch calls instead of a module's hooks and forward
MARK = "_guided_by_scfg"


def around(
    module: nn.Module,
    before: Callable[[tuple, dict], None],
    after: Callable[[object], object],
    failed: Callable[[], None],
) -> Callable[[], None]:
    """Put functions around every call of a module; a copy of the module goes without them.

    The call itself is wrapped, for hooks would be traced into the graph of a module compiled in
    place (``module.compile()``), and are not told of a KeyboardInterrupt.

    Args:
        module: A module, or a torch.compile of one.
        before: Gets args and kwargs.
        after: Gets the output and returns what takes its place.
        failed: Called where any of it raised.

    Returns:
        Function that takes them off again.
    """
    compiled = vars(module).get(CALL)
    on = True

    def call(*args, **kwargs):
        inner = module._call_impl if compiled is None else compiled
        if not on:  # another call has been put around this one
            return inner(*args, **kwargs)
        try:
            before(args, kwargs)
            return after(inner(*args, **kwargs))
        except BaseException:
            failed()
            raise

    def remove() -> None:
        nonlocal on
        on = False
        if vars(module).get(CALL) is not call:
            return
        if compiled is None:
            vars(module).pop(CALL)
        else:
            vars(module)[CALL] = compiled

    vars(module)[CALL] = call
    return remove


def is_marked(module: nn.Module) -> bool:
    """Whether a module, or the one inside a torch.compile of it, is attached to."""
    module = getattr(module, "_orig_mod", module)
    return vars(module).get(MARK) == id(module)


def mark(module: nn.Module) -> Callable[[], None]:
    """Note on a module that it is attached to; a copy of it is not.

    Returns:
        Function that takes the note away.
    """
    module = getattr(module, "_orig_mod", module)
    vars(module)[MARK] = id(module)

    def remove() -> None:
        vars(module).pop(MARK)

    return remove
