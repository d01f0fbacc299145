"""A GPU that is not there: the branches that code takes on one, computed on the CPU."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
READS = (Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.cpu, Tensor.__bool__, Tensor.__int__)


class PretendedCuda(TorchFunctionMode):
    """Within it tensors say that they are on a GPU, but for those that .cpu() gave; what is made there is made here.

    As on a GPU, a deterministic run has no cumsum of floats. `host_reads` counts what waits for the device; `called`:
    what was computed.
    """

    def __init__(self):
        super().__init__()
        self.host_reads, self.called = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.called.append(func)
        if func == Tensor.device.__get__:
            return torch.device("cpu") if hasattr(args[0], "on_host") else CUDA
        sums = func is Tensor.cumsum and kwargs.get("dtype", args[0].dtype).is_floating_point
        if sums and torch.are_deterministic_algorithms_enabled() and not hasattr(args[0], "on_host"):
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        if func in READS:
            self.host_reads += 1
        if func is Tensor.to:
            args = tuple(arg for arg in args if not isinstance(arg, torch.device))
        kwargs.pop("device", None)
        out = func(*args, **kwargs)
        if func is Tensor.cpu:
            out = out.view_as(out)
            out.on_host = True
        return out
