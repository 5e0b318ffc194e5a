"""What a site has, in the forms that a user may give it in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_mlopt.errors import InputError


@dataclass(frozen=True)
class SiteData:
    """
    What a site has.

    Args:
        train (`datasets.Dataset` or `torch.utils.data.Dataset`): Rows to train on, with a length.
        evaluation (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*): Rows of its own to evaluate on.
        plain (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*): Rows of `train` as they are, where it
            changes them at random; FedSM's selector looks at these.
    """

    train: Any
    evaluation: Any = None
    plain: Any = None


class SitesData:
    """
    Data of several sites, by name.

    Args:
        given (`Mapping[str, Any]`): Site to its `train` data set, to a mapping of splits, to a [`SiteData`], or to a
            function that returns one of these and is called when the site is first asked for.

    Raises:
        InputError: If what is given, as far as no function hides it, has no rows or other splits than are known.
    """

    def __init__(self, given: Mapping[str, Any]):
        self._data = {name: one if callable(one) else _site_data(name, one) for name, one in given.items()}

    @property
    def names(self) -> list[str]:
        """The sites, in the order they were given in."""
        return list(self._data)

    def __call__(self, name: str) -> SiteData:
        if callable(self._data[name]):
            self._data[name] = _site_data(name, self._data[name]())
        return self._data[name]


def _site_data(name: str, given: Any) -> SiteData:
    if isinstance(given, Mapping):
        unknown = set(given) - {"train", "test", "validation"}
        if "train" not in given or unknown:
            raise InputError(f"sites[{name!r}] has splits {list(given)}; give train, and test or validation")
        given = SiteData(given["train"], given.get("test", given.get("validation")))
    data = given if isinstance(given, SiteData) else SiteData(given)
    if not hasattr(data.train, "__len__"):
        raise InputError(f"sites[{name!r}]: a data set with a length is needed, to weigh the site by")
    if len(data.train) == 0:
        raise InputError(f"sites[{name!r}] has no rows to train on; leave it out, or give it data")
    return data
