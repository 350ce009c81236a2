"""vmap rules of a batch that is empty. Those of other batches are tested with each function."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

from pdp_kernels import (
    channel_norms,
    hard_mask,
    hard_mask_nm,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_thresholds,
    pq_index,
)

FUNCTIONS = {
    "pdp_mask": lambda w: pdp_mask(w, 0.5, return_mask=True),
    "pdp_mask_nm": lambda w: (pdp_mask_nm(w, 2, 4, out_dtype=torch.bfloat16),),
    "pdp_mask_channel": lambda w: pdp_mask_channel(w, 0.5, dim=1, return_mask=True),
    "pdp_thresholds": lambda w: (pdp_thresholds([w, w[0]], torch.tensor([0.5, 0.2])),),
    "hard_mask": lambda w: (hard_mask(w, 0.5),),
    "hard_mask_nm": lambda w: (hard_mask_nm(w),),
    "channel_norms": lambda w: (channel_norms(w, 1),),
    "pq_index": lambda w: pq_index([w, w], mask=[w > 0, None], scope="neuron"),
    "soft_mask_list": lambda w: torch.ops.pdp.soft_mask_list(
        [w, w[0]], w[0, :2].abs(), w[0, 2:4].abs(), True, None
    ),
}


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_of_an_empty_batch_have_the_shapes_and_dtypes_of_any(name, in_dim):
    one = torch.randn(5, 1, 8) if in_dim else torch.randn(1, 5, 8)
    results = vmap(FUNCTIONS[name], in_dim)(one.narrow(in_dim, 0, 0))
    expected = vmap(FUNCTIONS[name], in_dim)(one)
    assert [(r.shape, r.dtype) for r in results] == [
        (torch.Size([0, *e.shape[1:]]), e.dtype) for e in expected
    ]


def test_empty_batches_have_gradients():
    weights = torch.randn(0, 4, requires_grad=True)
    vmap(lambda w: pdp_mask(w, 0.5))(weights).sum().backward()
    assert weights.grad.shape == (0, 4)
    assert vmap(grad(lambda w: pdp_mask(w, 0.5).sum()))(weights.detach()).shape == (0, 4)
    assert jacrev(lambda w: pdp_mask(w, 0.5))(torch.empty(0)).shape == (0, 0)
    assert jacrev(lambda w: pdp_mask_channel(w, 0.5))(torch.empty(0, 3)).shape == (0, 3, 0, 3)
