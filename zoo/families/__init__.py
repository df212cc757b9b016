"""How a spec maps to and from the outside: configs and weight names. Tables and pure functions."""
