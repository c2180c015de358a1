"""The proxy alone under load: simulated workers, a client, references; `bench/proxy.py` is the command."""
