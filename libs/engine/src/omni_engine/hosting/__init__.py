"""Hosting of one engine as a worker: the prefill, decode and worker services, membership and block events."""
