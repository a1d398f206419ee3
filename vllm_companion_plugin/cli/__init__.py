"""The command line.

May import: core, host, wire, memory, keeper, client, fleet, holder, supervise, settings, errors.
Of other packages: google, prometheus_client, yaml.
"""
