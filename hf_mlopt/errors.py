"""The errors a user can cause, and nothing else: the command line prints them without a traceback."""


class InputError(ValueError):
    """Bad input found before any expensive work. The message names the field, the value and the remedy."""


class ConfigurationError(InputError):
    """
    A configuration field that is unknown, ill-typed or out of range.

    Args:
        field (`str`): Name of the field, as in YAML.
        value: The value given.
        allowed (`str`): What is allowed, or what to do instead.
    """

    def __init__(self, field: str, value: object, allowed: str):
        self.field, self.value = field, value
        super().__init__(f"{field}={value!r}: {allowed}")
