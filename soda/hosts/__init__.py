"""The only places that know a host program: one package per host, each on top of the library above it."""
