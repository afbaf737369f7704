"""What may hang on one module beside its class: hooks, and a ``forward`` of its own."""

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# How the hooks of HOOKS are to be called.
HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of ``module`` runs around its forward or backward."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on this very module, as Accelerate does to move what it is given."""
    return "forward" in vars(module)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks of ``source``: a hook removed from one is gone from both."""
    for attribute in (*HOOKS, *HOOK_OPTIONS):
        setattr(target, attribute, getattr(source, attribute))
