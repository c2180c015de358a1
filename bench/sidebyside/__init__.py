"""Side by side measurement of serving systems on one machine; `bench/serving.py` is the command."""
