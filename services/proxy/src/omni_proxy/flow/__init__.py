"""When a request goes to the workers: one bounded queue, released as workers come to have room.

`queue` and what it is made of are pure, with the clock passed in; `gate` is the asyncio edge around it.
"""
