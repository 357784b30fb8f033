#!/usr/bin/env bash
# curl. --fail-with-body needs curl 7.76, %header{...} needs 7.84.
set -euo pipefail

BASE_URL=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
API_KEY=${OPENAI_API_KEY:-EMPTY}

# --fail-with-body: what was wrong is shown, and curl ends with 22.
curl -sS --fail-with-body "$BASE_URL/chat/completions" \
  -H "Authorization: Bearer $API_KEY" -H "Content-Type: application/json" \
  -H "X-Request-Id: my-request-1" \
  -d '{"messages": [{"role": "user", "content": "What is 23 + 58?"}], "temperature": 0}'
echo

# As a stream; -N shows each event when it comes.
curl -N -sS --fail-with-body "$BASE_URL/chat/completions" \
  -H "Authorization: Bearer $API_KEY" -H "Content-Type: application/json" \
  -d '{"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "stream": true}'

# The same again, and what must come of it.
MESSAGES='[{"role": "user", "content": "What is 23 + 58?"}]'

ask() { # ask BODY [OPTION ...]
  curl -sS --fail-with-body "$BASE_URL/chat/completions" -H "Authorization: Bearer $API_KEY" \
    -H "Content-Type: application/json" -d "$1" "${@:2}"
}

must() { # must WHAT IN: that it is there
  grep -qF -- "$1" <<<"$2" || { echo "'$1' is not in: $2" >&2; exit 1; }
}

whole=$(ask '{"messages": '"$MESSAGES"', "temperature": 0}' -H "X-Request-Id: my-request-1" -i)
must '"content":"23 + 58 = 81."' "$whole"
must 'x-request-id: my-request-1' "$whole"
must '"id":"chatcmpl-my-request-1"' "$whole"

stream=$(ask '{"messages": '"$MESSAGES"', "temperature": 0, "stream": true}' -N -i)
must 'content-type: text/event-stream' "$stream"
must '"finish_reason":"stop"' "$stream"
test "$(tail -n 1 <<<"$stream")" = "data: [DONE]" || { echo "no [DONE] at the end" >&2; exit 1; }
text=$(sed -n 's/.*"delta":{"content":"\([^"]*\)"}.*/\1/p' <<<"$stream" | tr -d '\n')
echo "streamed: $text"
test "$text" = "23 + 58 = 81."

refused() { # refused STATUS WHAT BODY [OPTION ...]
  local code=0 answer
  answer=$(ask "${@:3}" -w '\n%{http_code} %header{x-request-id}') || code=$?
  echo "refused: $answer"
  test "$code" = 22 || { echo "curl ended with $code" >&2; exit 1; }
  must "$2" "$answer"
  [[ ${answer##*$'\n'} =~ ^$1\ [0-9a-z]+$ ]] || { echo "no $1 with a request id" >&2; exit 1; }
}

refused 400 '"param":"temperature"' '{"messages": '"$MESSAGES"', "temperature": 7}'
API_KEY=wrong refused 401 '"code":"invalid_api_key"' '{"messages": '"$MESSAGES"'}'

# What needs no key.
ROOT=${BASE_URL%/v1}
health=$(curl -sS --fail -I "$ROOT/health")
echo "health: ${health%%$'\r'*}"
must 'HTTP/1.1 200 OK' "$health"
hello=$(curl -sS --fail "$ROOT/")
echo "$hello"
test "$hello" = "Ollama is running"
