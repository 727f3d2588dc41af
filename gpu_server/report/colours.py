"""The colours of pictures, and what these are on a page at night."""

__all__ = ["AT_NIGHT", "COLOURS", "GRID", "INK", "PAPER", "QUIET", "TINTS"]

PAPER, INK, QUIET, GRID = "#ffffff", "#1c2024", "#5c636b", "#e4e7ea"
COLOURS = ("#0068b0", "#c34a00", "#00805a", "#a83b86", "#7a6300", "#5a54c4", "#b3243c", "#33717f")
"""Of runs. People with most kinds of colour blindness tell the first four apart; all stand out from white by 4.5 : 1."""
AT_NIGHT = {
    PAPER: "#16191d",
    INK: "#e8eaed",
    QUIET: "#a3abb4",
    GRID: "#30363d",
    **dict(
        zip(
            COLOURS,
            ("#58b0f0", "#ff9457", "#3ecf9c", "#e88bc8", "#d3b83c", "#a9a4ff", "#ff8292", "#79c0d0"),
            strict=True,
        )
    ),
}

TINTS = {
    "edge_compute": "#8fbfe8",
    "encode": "#d9c8f0",
    "uplink": "#f7b27e",
    "queue": "#d4d8dc",
    "server_compute": "#8ed3b4",
    "downlink": "#f5d58a",
    "decode": "#efb6d6",
}
"""Of the parts of the time, by day and at night: black text can be read on all of them."""
