"""Which workers a request goes to. Pure: values in, a `Decision` out."""
