"""What every plug-in has to hold to, whoever wrote it: functions that raise `AssertionError` and say what is wrong.

    from omni_proxy.scheduling.conformance import check_policy

    def test_conforms():
        check_policy(lambda: MyPolicy(MyParameters()))

Each makes its plug-in several times, shows it random fleets from a fixed seed, and tries it on what is rare in a test
and common in a cluster: nobody there, everybody excluded, workers that cannot pair, two sizes of fleet, many sessions.
"""

from omni_proxy.scheduling.conformance.columns import check_filter, check_scorer
from omni_proxy.scheduling.conformance.orders import check_order
from omni_proxy.scheduling.conformance.policies import check_decision, check_policy
from omni_proxy.scheduling.conformance.predictors import check_predictor

__all__ = ["check_decision", "check_filter", "check_order", "check_policy", "check_predictor", "check_scorer"]
