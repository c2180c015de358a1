"""The policy in force."""

from omni_proxy.schedule_config import ScheduleConfig
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView


class LivePolicy:
    """Made anew when its part of the configuration changes; else what it remembers of sessions stays."""

    def __init__(self, config: ScheduleConfig) -> None:
        self._made_of = (config.policy, config.filters)
        self._policy = config.make_policy()

    def reconfigure(self, config: ScheduleConfig) -> None:
        made_of = (config.policy, config.filters)
        if made_of != self._made_of:
            self._policy, self._made_of = config.make_policy(), made_of

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        return self._policy.choose(request, view)
