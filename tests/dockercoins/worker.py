"""worker: takes random bytes from rng, has hasher hash them, counts `hashes` in Redis and keeps the coins in `wallet`."""

import socket
import time
import urllib.request

WAIT_SECONDS = 0.1


class Redis:
    """Just enough of the Redis protocol for two commands."""

    def __init__(self, host: str) -> None:
        self.stream = socket.create_connection((host, 6379), timeout=5).makefile("rwb")

    def call(self, *words: str) -> bytes:
        parts = [f"*{len(words)}\r\n".encode()]
        for word in words:
            data = word.encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
        self.stream.write(b"".join(parts))
        self.stream.flush()
        answer: bytes = self.stream.readline().rstrip()
        if answer.startswith(b"-"):
            raise RuntimeError(answer.decode())
        return answer


def work_once(redis: Redis) -> None:
    with urllib.request.urlopen("http://rng/32", timeout=5) as answer:
        random = answer.read()
    request = urllib.request.Request("http://hasher/", data=random, headers={"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        digest = answer.read().decode()
    redis.call("INCRBY", "hashes", "1")
    if digest.startswith("0"):
        redis.call("HSET", "wallet", digest, random.hex())


def main() -> None:
    while True:
        try:
            redis = Redis("redis")
            while True:
                work_once(redis)
                time.sleep(WAIT_SECONDS)
        except (OSError, RuntimeError) as error:
            print(f"in work loop: {error}; waiting 1 s", flush=True)
            time.sleep(1)


if __name__ == "__main__":
    main()
