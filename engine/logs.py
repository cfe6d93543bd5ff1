"""What the engine says to people: one logger, ``engine``, that writes lines to standard error.

An application that sets the logger up itself (a handler, or a level) has its way. To silence the engine:
``logging.getLogger("engine").setLevel(logging.WARNING)``.
"""

import logging


def get_logger() -> logging.Logger:
    """The ``engine`` logger; at its first use it gets a handler if it has none of its own."""
    logger = logging.getLogger("engine")
    if not logger.handlers and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("engine: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
