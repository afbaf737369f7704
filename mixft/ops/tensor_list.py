"""A list of tensors that remembers what a launch would ask each of them for again at every step."""

from collections.abc import Iterable
from operator import attrgetter

from torch import Tensor


class TensorList(list[Tensor]):
    """Tensors, with what whoever made the list knows to hold while it is in use.

    Args:
        tensors: the tensors.
        like: a list whose tensors had these sizes, dtypes and layouts; None to ask the tensors.

    Attributes:
        sizes: the number of elements of each.
        dtypes: of each.
        contiguous: whether all are.
    """

    def __init__(self, tensors: Iterable[Tensor], like: "TensorList | None" = None) -> None:
        super().__init__(tensors)
        if like is None:
            self.sizes = tuple(map(Tensor.numel, self))
            self.dtypes = tuple(map(attrgetter("dtype"), self))
            self.contiguous = all(map(Tensor.is_contiguous, self))
        else:
            self.sizes, self.dtypes, self.contiguous = like.sizes, like.dtypes, like.contiguous
