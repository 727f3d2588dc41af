"""Where the time of a split run went, in a line or two."""

from collections.abc import Mapping

__all__ = ["where_time_went"]

ADVICE = {
    "edge_compute": "a smaller --cut-layer on the server leaves devices less to compute",
    "encode": "making bytes takes longer than sending them: --codec bfloat16 or float32 on the server takes less",
    "decode": "reading bytes takes longer than receiving them: --codec bfloat16 or float32 on the server takes less",
    "uplink": "a leaner --codec on the server (int8, int4, delta), or a higher --aggregate-every, sends less",
    "downlink": "a leaner --codec on the server (int8, int4, delta), or a higher --aggregate-every, sends less",
    "queue": "it waits for slower devices: give those a smaller --batch-size, or the server a --quorum",
    "server_compute": "a higher --cut-layer on the server moves work to the devices; or give the server a faster processor",
}


def where_time_went(seconds: Mapping[str, float]) -> str:
    """
    Args:
        seconds: by part: edge_compute, encode, uplink, queue, server_compute, downlink, decode.

    Returns:
        The parts' shares, and what to change about the largest. Empty where no time went.
    """
    total = sum(seconds.values())
    if total <= 0:
        return ""
    shares = ", ".join(f"{_name(part)} {100 * spent / total:.0f} %" for part, spent in seconds.items())
    largest = max(seconds, key=lambda part: seconds[part])
    return f"time: {shares}\nmost of it goes to {_name(largest)}: {ADVICE[largest]}"


def _name(part: str) -> str:
    return part.replace("_", " ")
