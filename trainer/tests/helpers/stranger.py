"""A stranger on the network: connects to every given port again and again, talks nonsense, and keeps the connections.

``python stranger.py ADDRESS PORT...``
"""

import socket
import sys
import time

NONSENSE = (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, b"\xff" * 9, b"")
EACH = 150

kept = []
for port in map(int, sys.argv[2:]):
    for number in range(EACH):
        try:
            peer = socket.create_connection((sys.argv[1], port), timeout=2)
            peer.sendall(NONSENSE[number % len(NONSENSE)])
            kept.append(peer)
        except OSError:
            continue
print("kept", len(kept), flush=True)
time.sleep(120)
