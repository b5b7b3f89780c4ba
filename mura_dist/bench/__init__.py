"""The benchmarks of `mura-dist bench`."""
