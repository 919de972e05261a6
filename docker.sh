#!/usr/bin/env bash
#
# Starts a fresh ClickHouse in Docker, with the user, password and database that producer.py and
# perspective_server.py use by default, and waits until it answers a query. A container that an
# earlier run left is removed first, and its data with it.
#
# No arguments. These environment variables change what it does:
#   CLICKHOUSE_IMAGE        the image, default clickhouse/clickhouse-server:latest
#   CLICKHOUSE_HTTP_PORT    the port on this machine for HTTP, default 8123
#   CLICKHOUSE_NATIVE_PORT  the port on this machine for clickhouse-client, default 9000
#   CLICKHOUSE_WAIT         how many seconds to wait for an answer, default 60

set -euo pipefail

image=${CLICKHOUSE_IMAGE:-clickhouse/clickhouse-server:latest}
http_port=${CLICKHOUSE_HTTP_PORT:-8123}
native_port=${CLICKHOUSE_NATIVE_PORT:-9000}
wait_seconds=${CLICKHOUSE_WAIT:-60}
name=prsp-clickhouse

# Exported, so that docker takes them by name: a value in an argument shows up in `ps`.
export CLICKHOUSE_USER=admin CLICKHOUSE_PASSWORD=admin1234 CLICKHOUSE_DB=test
export CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT=1 # this user may create others

without_docker="or do without Docker: python perspective_server.py --embedded"

fail() {
  echo "docker.sh: $*" >&2
  exit 1
}

# Asks from outside, as the programs will. While the image creates the database, a first server
# runs that listens only inside the container, so asking in there would say "ready" too early.
# Bash speaks HTTP by itself here: curl is not on every machine, and the password stays out of
# `ps`. The parentheses make it a subshell, so a connection that breaks off ends nothing else.
answers_a_query() (
  exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$http_port" || exit 1
  printf '%s\r\n' "GET /?query=SELECT+1 HTTP/1.0" \
    "X-ClickHouse-User: $CLICKHOUSE_USER" "X-ClickHouse-Key: $CLICKHOUSE_PASSWORD" "" >&3
  IFS='' read -r -d '' -t 1 answer <&3 || true # "failure" is just the end of the answer
  [[ $answer == "HTTP/1."?" 200 "* && $answer == *$'\n1\n'* ]]
)

if [ $# -gt 0 ]; then
  echo "usage: ./docker.sh (no arguments; the head of the file names its environment variables)" >&2
  exit 2
fi
case $http_port$native_port$wait_seconds in
  *[!0-9]*) fail "the two ports and CLICKHOUSE_WAIT have to be whole numbers" ;;
esac

# 1. Is Docker there?
command -v docker >/dev/null || fail "Docker is not installed: install it, $without_docker"
if ! problem=$(docker info 2>&1 >/dev/null); then
  case $problem in
    *"permission denied"*) fail "you may not use Docker: join the group docker, $without_docker" ;;
    *) fail "the Docker daemon is not running: start it, $without_docker" ;;
  esac
fi

# 2. The newest image; without a network, the one that is here.
if ! docker pull "$image"; then
  docker image inspect "$image" >/dev/null 2>&1 ||
    fail "cannot pull $image: check its name and the network, $without_docker"
  echo "Cannot pull $image, so the copy on this machine has to do."
fi

# 3. Start it, reachable from this machine alone.
docker rm --force --volumes "$name" >/dev/null 2>&1 || true # there may be none
if ! problem=$(docker run --detach --name "$name" \
  --ulimit nofile=262144:262144 \
  --publish "127.0.0.1:$http_port:8123" \
  --publish "127.0.0.1:$native_port:9000" \
  --env CLICKHOUSE_USER --env CLICKHOUSE_PASSWORD --env CLICKHOUSE_DB \
  --env CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT \
  "$image" 2>&1 >/dev/null); then
  docker rm --force --volumes "$name" >/dev/null 2>&1 || true # it may have been created
  case $problem in
    *"already allocated"* | *"address already in use"* | *"orts are not available"*)
      taken="$http_port or $native_port"
      [[ $problem =~ 127\.0\.0\.1:([0-9]+) ]] && taken=${BASH_REMATCH[1]}
      fail "port $taken is taken: free it, or set CLICKHOUSE_HTTP_PORT or CLICKHOUSE_NATIVE_PORT"
      ;;
    *) fail "cannot start the container: $problem" ;;
  esac
fi

# 4. Wait for it, as long as it runs.
echo "Waiting for ClickHouse on port $http_port ..."
deadline=$((SECONDS + wait_seconds))
until answers_a_query; do
  if [ "$(docker inspect --format '{{.State.Running}}' "$name" 2>/dev/null)" != true ]; then
    what="is not running any more"
  elif [ $SECONDS -ge $deadline ]; then
    what="did not answer a query within $wait_seconds seconds"
  else
    sleep 0.5
    continue
  fi
  docker logs "$name" >&2 || true
  fail "the container $name $what; its log is above"
done

echo "ClickHouse is ready. Next, each in a terminal of its own:"
if [ "$http_port" != 8123 ]; then
  echo "  export CLICKHOUSE_DSN=clickhouse://admin:PASSWORD@localhost:$http_port/test  # in both"
fi
echo "  python producer.py"
echo "  python perspective_server.py"
echo "To end it and delete its data: docker rm --force --volumes $name"
