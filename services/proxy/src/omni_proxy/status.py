"""Pages about the proxy itself: health, readiness, metrics, the fleet as seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import orjson
from fastapi import Request, Response
from prometheus_client.exposition import choose_encoder

from omni_common.errors import NotFound
from omni_proxy.admission import Admission
from omni_proxy.bodies import query_limit
from omni_proxy.explain import Explanations
from omni_proxy.fleet import Fleet
from omni_proxy.membership import KvStoreMembership, StaticMembership
from omni_proxy.metrics import Metrics
from omni_proxy.saturation import Saturation
from omni_proxy.worker import Member, Role

_LATEST_DECISIONS = 20


@dataclass(frozen=True, slots=True)
class StatusPages:
    fleet: Fleet
    admission: Admission
    metrics_of: Metrics
    kvstore: KvStoreMembership | None
    model: str
    explanations: Explanations
    load: Saturation
    statics: Sequence[StaticMembership] = ()

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 if a request could be served; the parts say why not."""
        is_ready = self.fleet.can_decode and not self.admission.is_draining
        parts: dict[str, object] = {
            "proxy": "draining" if self.admission.is_draining else "ok",
            "kvstore": self._kvstore(),
            "workers": {
                **{m.worker.id: self._refusal(m) or "ok" for m in self.fleet.members},
                **{static.address: static.state for static in self._unmet()},
            },
        }
        if not self.fleet.can_decode:
            parts["decode"] = "no decode worker takes work"
        return _json({"ready": is_ready, "parts": parts}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """In OpenMetrics, which has exemplars, for scrapers that accept it."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.metrics_of.registry), headers={"content-type": content_type})

    def observe(self) -> None:
        """Set the gauges of the fleet."""
        usable = [m for m in self.fleet.members if self._refusal(m) is None]
        for role in Role:
            self.metrics_of.workers.labels(role).set(sum(m.worker.role is role for m in usable))
        if self.kvstore is not None and (age := self.kvstore.age_s) is not None:
            self.metrics_of.membership_age.set(age)
        for state, count in self.fleet.health.counts(self.fleet.now()).items():
            self.metrics_of.health.workers.labels(state).set(count)
        self.fleet.replica.observe()
        for model, confidence in self.fleet.times.confidence().items():
            self.metrics_of.prediction_confidence.labels(model).set(confidence)

    async def workers(self, request: Request) -> Response:
        return _json(
            {
                "model": self.model,
                "kvstore": self._kvstore(),
                "workers": self._workers(self.fleet.members),
                "unreachable": [{"address": static.address, "state": static.state} for static in self._unmet()],
            }
        )

    async def saturation(self, request: Request) -> Response:
        """How full each role is, for autoscalers."""
        return _json(self.load.to_json())

    async def decisions(self, request: Request) -> Response:
        """The latest requests, newest first, without candidates."""
        limit = query_limit(request, _LATEST_DECISIONS)
        return _json({"decisions": [one.summary() for one in self.explanations.latest(limit)]})

    async def decision(self, request: Request) -> Response:
        """Every decision about one request with all its candidates, or the best `limit` of each leg."""
        request_id = request.path_params["request_id"]
        found = self.explanations.get(request_id)
        if found is None:
            raise NotFound(f"no decision is known of the request {request_id!r}", reason="request_not_found")
        limit = query_limit(request, 0)
        return _json(found.to_json(limit or None))

    def _workers(self, members: Sequence[Member]) -> list[dict[str, object]]:
        saturation = self.load.workers()
        return [
            {
                **asdict(m.worker),
                "adapters": sorted(m.worker.adapters),
                "takes_work": self._refusal(m) is None,
                "refusal": self._refusal(m),
                "load": asdict(m.load) | {"adapters": sorted(m.load.adapters)},
                "in_flight": asdict(self.fleet.ledger.of(m.worker.id)),
                "saturation": saturation.get(m.worker.id),
            }
            for m in members
        ]

    def _unmet(self) -> Sequence[StaticMembership]:
        return [static for static in self.statics if not static.is_met]

    def _refusal(self, member: Member) -> str | None:
        if member.worker.model != self.model:
            return f"serves {member.worker.model}"
        return self.fleet.refusal(member)

    def _kvstore(self) -> dict[str, object]:
        if self.kvstore is None:
            return {"state": "not configured"}
        state = "unreachable"
        if self.kvstore.is_connected:
            state = "degraded" if self.kvstore.is_degraded else "ok"
        return {"state": state, "age_s": self.kvstore.age_s, "replica_age_s": self.fleet.replica.age_s}


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
