"""Be called before and after a module, compiled or not."""

from collections.abc import Callable

from torch import nn


def around(
    module: nn.Module,
    before: Callable[[tuple, dict], None],
    after: Callable[[object], object],
    failed: Callable[[], None],
) -> Callable[[], None]:
    """Put functions around every call of a module.

    Args:
        module: A module, or a torch.compile of one. One compiled in place (``module.compile()``)
            would trace hooks into its graph; there the compiled call is wrapped instead.
        before: Gets args and kwargs.
        after: Gets the output and returns what takes its place.
        failed: Called where the module raised an Exception.

    Returns:
        Function that takes them off again.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        hooks = [
            module.register_forward_pre_hook(lambda _, *call: before(*call), with_kwargs=True),
            module.register_forward_hook(
                lambda _, args, output: failed() if output is None else after(output),
                always_call=True,
            ),
        ]
        return lambda: [hook.remove() for hook in hooks]

    def call(*args, **kwargs):
        before(args, kwargs)
        try:
            output = compiled(*args, **kwargs)
        except Exception:
            failed()
            raise
        return after(output)

    module._compiled_call_impl = call
    return lambda: setattr(module, "_compiled_call_impl", compiled)
