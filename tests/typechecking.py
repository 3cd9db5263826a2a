"""The checker that conftest.py applies to all annotations of m3jax."""

from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int serves where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
