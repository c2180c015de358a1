"""`omni placement`: layouts on paper and in running services. `omni` loads `app.app` by entry point.

Commands that talk to a service find it through `context.obj`, which `omni` sets and which has
`address_of(service, name=, port=, home=)`. Errors leave as `OmniError`; `omni` prints them and chooses the exit code:
2 for what was asked, 4 for what is not there.
"""
