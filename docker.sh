#!/usr/bin/env bash
#
# Starts a fresh ClickHouse in Docker, with the user, password and database that producer.py and
# perspective_server.py use by default, and waits until it answers a query. The container of an
# earlier start is removed, and its data with it; to bring that one back, for example after a
# reboot, run `docker start prsp-clickhouse` instead of this script.
#
# No arguments. These environment variables change what it does:
#   CLICKHOUSE_IMAGE        the image, default clickhouse/clickhouse-server:latest
#   CLICKHOUSE_HTTP_PORT    the port on this machine for HTTP, default 8123
#   CLICKHOUSE_NATIVE_PORT  the port on this machine for clickhouse-client, default 9000
#   CLICKHOUSE_WAIT         how many seconds to wait for an answer, default 60

set -euo pipefail

name=prsp-clickhouse
image=${CLICKHOUSE_IMAGE:-clickhouse/clickhouse-server:latest}
http_port=${CLICKHOUSE_HTTP_PORT:-8123}
native_port=${CLICKHOUSE_NATIVE_PORT:-9000}
wait_seconds=${CLICKHOUSE_WAIT:-60}
no_docker="or run without Docker: python perspective_server.py --embedded"

# Docker passes these into the container. The demo's password is public.
export CLICKHOUSE_USER=admin CLICKHOUSE_PASSWORD=admin1234 CLICKHOUSE_DB=test
export CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT=1 # this user may create others

fail() { echo "docker.sh: $*" >&2; exit 1; }

# Runs `docker run` with the options given; on failure $problem holds Docker's message.
run_container() {
  problem=$(docker run --detach --name "$name" "$@" \
    --publish "127.0.0.1:$http_port:8123" --publish "127.0.0.1:$native_port:9000" \
    --env CLICKHOUSE_USER --env CLICKHOUSE_PASSWORD --env CLICKHOUSE_DB \
    --env CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT "$image" 2>&1 >/dev/null) && return
  docker rm --force --volumes "$name" >/dev/null 2>&1 || true # it may have been created
  return 1
}

cannot_start() {
  case $problem in
    *"already allocated"* | *"address already in use"* | *"orts are not available"*)
      [[ $problem =~ 127\.0\.0\.1:([0-9]+) ]] && taken=${BASH_REMATCH[1]}
      taken=${taken:-$http_port or $native_port}
      fail "port $taken is taken: free it, or set CLICKHOUSE_HTTP_PORT or CLICKHOUSE_NATIVE_PORT"
      ;;
    *) fail "cannot start the container: ${problem//$'\n'/ }" ;;
  esac
}

# Asks from outside, since the image runs a first server that listens only inside the container.
# Bash speaks HTTP by itself, so curl is not needed. The subshell contains a broken connection.
answers_a_query() (
  exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$http_port" || exit 1
  printf '%s\r\n' "GET /?query=SELECT+1 HTTP/1.0" \
    "X-ClickHouse-User: $CLICKHOUSE_USER" "X-ClickHouse-Key: $CLICKHOUSE_PASSWORD" "" >&3
  IFS='' read -r -d '' -t 1 answer <&3 || true # "failure" is just the end of the answer
  [[ $answer == "HTTP/1."?" 200 "* && $answer == *$'\n1\n'* ]]
)

[ $# -eq 0 ] || { echo "usage: ./docker.sh (no arguments; see its first lines)" >&2; exit 2; }
for name_value in "HTTP_PORT=$http_port" "NATIVE_PORT=$native_port" "WAIT=$wait_seconds"; do
  [[ $name_value =~ =[1-9][0-9]*$ ]] || fail "not a positive whole number: CLICKHOUSE_$name_value"
done

command -v docker >/dev/null || fail "Docker is not installed: install it, $no_docker"
problem=$(docker info 2>&1 >/dev/null) || case $problem in
  *"permission denied"*) fail "no permission to use Docker: join the group docker, $no_docker" ;;
  *) fail "the Docker daemon is not running: start it, $no_docker" ;;
esac
if ! docker pull "$image"; then
  docker image inspect "$image" >/dev/null 2>&1 ||
    fail "cannot pull $image: check its name and the network, $no_docker"
  echo "Cannot pull $image, using the copy on this machine."
fi
if docker container inspect "$name" >/dev/null 2>&1; then
  echo "Removing the container $name of an earlier start, and its data."
  docker rm --force --volumes "$name" >/dev/null || fail "cannot remove the container $name"
fi
if ! run_container --ulimit nofile=262144:262144; then
  [[ $problem == *rlimit* ]] || cannot_start
  echo "Docker cannot raise the limit of open files to 262144: starting without it."
  run_container || cannot_start
fi

echo "Waiting for ClickHouse on port $http_port ..."
SECONDS=0
until answers_a_query; do
  state=$(docker inspect --format '{{.State.Status}}' "$name" 2>/dev/null) || true
  if [[ $state != running || $SECONDS -ge $wait_seconds ]]; then
    docker logs "$name" >&2 || true
    fail "no answer after $SECONDS s (container $name: ${state:-removed}); see its log above"
  fi
  sleep 0.5
done

echo "ClickHouse is ready. Next, each in a terminal of its own:"
[ "$http_port" = 8123 ] ||
  echo "  export CLICKHOUSE_DSN=clickhouse://admin:admin1234@localhost:$http_port/test"
printf '  %s\n' "python producer.py" "python perspective_server.py"
echo "After a reboot: docker start $name. To delete it: docker rm --force --volumes $name"
