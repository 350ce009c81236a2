"""Optimizers as the user has them: wrapped or not, with any parameters."""

from torch.optim import Optimizer


def torch_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer. Of a wrapper, such as accelerate's, return the one that it wraps.

    The hooks of its steps run from now on. timm's Lookahead leaves Optimizer.__init__ out, and its
    hooks would wait for the first zero_grad, which calls this too.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    wrapped = getattr(optimizer, "optimizer", None)
    if isinstance(wrapped, Optimizer):
        return torch_optimizer(wrapped)
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            "optimizer must have the hooks of torch.optim.Optimizer, got a "
            f"{type(optimizer).__name__}, which leaves out Optimizer.__init__: call pruner.step in "
            "place of attach, and freeze zeros in the optimizer that it wraps"
        )
    optimizer._patch_step_function()
    return optimizer


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer trains."""
    return {id(weight) for group in optimizer.param_groups for weight in group["params"]}
