"""Training libraries: each module needs its library, and the package imports none of them."""
