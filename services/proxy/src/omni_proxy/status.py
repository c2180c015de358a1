"""Pages about the proxy itself: health, readiness, metrics, the fleet as seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import orjson
from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from omni_proxy.admission import Admission
from omni_proxy.fleet import Fleet, Member, Role
from omni_proxy.membership import KvStoreMembership
from omni_proxy.metrics import Metrics


@dataclass(frozen=True, slots=True)
class StatusPages:
    fleet: Fleet
    admission: Admission
    metrics_of: Metrics
    kvstore: KvStoreMembership | None
    model: str

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 if a request could be served; the parts say why not."""
        is_ready = self.fleet.can_decode and not self.admission.is_draining
        parts: dict[str, object] = {
            "proxy": "draining" if self.admission.is_draining else "ok",
            "kvstore": self._kvstore(),
            "workers": {m.worker.id: self._refusal(m) or "ok" for m in self.fleet.members},
        }
        if not self.fleet.can_decode:
            parts["decode"] = "no decode worker takes work"
        return _json({"ready": is_ready, "parts": parts}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        usable = [m for m in self.fleet.members if self._refusal(m) is None]
        for role in Role:
            self.metrics_of.workers.labels(role).set(sum(m.worker.role is role for m in usable))
        if self.kvstore is not None and (age := self.kvstore.age_s) is not None:
            self.metrics_of.membership_age.set(age)
        self.fleet.replica.observe()
        return Response(generate_latest(self.metrics_of.registry), media_type=CONTENT_TYPE_LATEST)

    async def workers(self, request: Request) -> Response:
        return _json({"model": self.model, "kvstore": self._kvstore(), "workers": self._workers(self.fleet.members)})

    def _workers(self, members: Sequence[Member]) -> list[dict[str, object]]:
        return [
            {
                **asdict(m.worker),
                "takes_work": self._refusal(m) is None,
                "refusal": self._refusal(m),
                "load": asdict(m.load),
                "in_flight": asdict(self.fleet.ledger.of(m.worker.id)),
            }
            for m in members
        ]

    def _refusal(self, member: Member) -> str | None:
        if member.worker.model != self.model:
            return f"serves {member.worker.model}"
        return member.refusal

    def _kvstore(self) -> dict[str, object]:
        if self.kvstore is None:
            return {"state": "not configured"}
        state = "unreachable"
        if self.kvstore.is_connected:
            state = "degraded" if self.kvstore.is_degraded else "ok"
        return {"state": state, "age_s": self.kvstore.age_s, "replica_age_s": self.fleet.replica.age_s}


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
