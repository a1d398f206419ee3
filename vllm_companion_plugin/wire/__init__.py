"""What goes between processes: protobuf messages, their translation from and to values, and descriptors over a Unix
socket. Whatever comes from outside is checked here.

May import: core, host, memory.descriptors, memory.kinds, errors.
Of other packages: google, grpc.
"""
