"""A proxy's scheduling over a simulated fleet of prefill and decode engines. Events in order of time, no wall clock."""
