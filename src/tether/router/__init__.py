"""Routers: what their experts cost, terms that shape them, what their routing is like, and routing among deltas.

Names are loaded when they are first used: some of them need transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.router.attach import find_sites, make_site
    from tether.router.callback import RoutingCallback
    from tether.router.course import RoutingCourse
    from tether.router.experts import Experts
    from tether.router.fisher import delta_cost, empirical_fisher
    from tether.router.journal import RouteJournal
    from tether.router.metrics import RouteStatistics
    from tether.router.mixture import upcycle
    from tether.router.options import Shaping
    from tether.router.shaper import RoutingShaper
    from tether.router.training import RouterFit, train_routers

_NAMES = {
    "Experts": "experts",
    "RouteJournal": "journal",
    "RouteStatistics": "metrics",
    "RouterFit": "training",
    "RoutingCallback": "callback",
    "RoutingCourse": "course",
    "RoutingShaper": "shaper",
    "Shaping": "options",
    "delta_cost": "fisher",
    "empirical_fisher": "fisher",
    "find_sites": "attach",
    "make_site": "attach",
    "train_routers": "training",
    "upcycle": "mixture",
}

__all__ = [
    "Experts",
    "RouteJournal",
    "RouteStatistics",
    "RouterFit",
    "RoutingCallback",
    "RoutingCourse",
    "RoutingShaper",
    "Shaping",
    "delta_cost",
    "empirical_fisher",
    "find_sites",
    "make_site",
    "train_routers",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"tether.router.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
