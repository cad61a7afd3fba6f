"""How many examples a property test draws: what it names, or ten times that in `make test-full`.

`@settings(max_examples=examples(50))` overrides a profile, so the number is taken from it here:
the "long" profile draws a thousand where Hypothesis itself draws a hundred.
"""

from hypothesis import settings

settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)


def examples(number: int) -> int:
    """`number`, times the profile's max_examples over the usual 100."""
    return number * settings.default.max_examples // 100
