"""Who a worker is in its cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from omni_engine.hosting.settings import WorkerSettings


@dataclass(slots=True)
class Identity:
    """Name, address and epoch of one start of a worker; name and address follow from the bound port."""

    epoch: int
    labels: Mapping[str, str] = field(default_factory=dict)
    worker_id: str = ""
    address: str = ""

    def bind(self, settings: WorkerSettings, port: int) -> None:
        """The server listens on `port`."""
        self.worker_id = settings.name_at(port)
        self.address = settings.address_at(port)
