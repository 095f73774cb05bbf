package locker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// quote encodes a string as JSON like a server: it does not escape < and the like.
func quote(t *testing.T, s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	require.NoError(t, e.Encode(s))
	return strings.TrimSuffix(b.String(), "\n")
}

// Any program can write to the channel. No payload causes a panic, and a payload that is understood
// means the same when it is encoded again. The messages of the statements and of an operator arrive
// as they were sent.
func FuzzDecodeMessage(f *testing.F) {
	id := []byte("0123456789abcdef")
	for _, payload := range []string{
		``, `{}`, `null`, `[]`, `7`, `"x"`, `{`, "\x00", "\xff",
		`{"lockKey":1}`, `{"lockKey":1,"event":"stop"}`, `{"lockKey":null}`, `{"lockKey":"1"}`,
		`{"lockKey":1e3}`, `{"lockKey":9223372036854775808}`, `{"LOCKKEY":5,"Event":"x"}`,
		`{"kind":"claim","lockKey":-1,"claim":2,"id":"6ba7b810-9dad-11d1-80b4-00c04fd430c8","event":"a"}`,
		`{"kind":"claim","lockKey":1,"id":"{6ba7b810-9dad-11d1-80b4-00c04fd430c8}"}`,
		`{"kind":"claim","lockKey":1,"id":""}`, `{"kind":"claim"}`, `{"kind":"claim","id":7}`,
		`{"kind":"released","lockKey":0}`, `{"kind":"check","id":"6ba7b810-9dad-11d1-80b4-00c04fd430c8"}`,
		`{"kind":"new"}`, `{"kind":{}}`, `{"message":{"lockKey":3}}`, `{"lockKey":1}{"lockKey":2}`,
		`{"lockKey":1,"lockKey":2}`, `{"lockKey":1,"event":"\ud800"}`, strings.Repeat(`[`, 200),
	} {
		f.Add(payload, int64(1), int64(2), id, "synchronize")
	}
	f.Add(``, int64(math.MinInt64), int64(math.MaxInt64), []byte{}, "\x00\xff\u2028<\"\\")
	f.Fuzz(func(t *testing.T, payload string, key, number int64, idBytes []byte, event string) {
		if m, err := decodeMessage(payload); err == nil {
			again, err := json.Marshal(m)
			require.NoError(t, err)
			same, err := decodeMessage(string(again))
			require.NoError(t, err)
			require.Equal(t, m, same)
		}

		var id uuid.UUID
		copy(id[:], idBytes)
		event = cleanEvent(event)
		for payload, want := range map[string]message{
			fmt.Sprintf(`{"kind":"claim","lockKey":%d,"claim":%d,"id":"%s","event":%s}`, key, number, id, quote(t, event)): {
				Kind: kindClaim, LockKey: key, Claim: number, ID: id, Event: event},
			fmt.Sprintf(`{"kind":"released","lockKey":%d}`, key):                     {Kind: kindReleased, LockKey: key},
			fmt.Sprintf(`{"kind":"check","id":"%s"}`, id):                            {Kind: kindCheck, ID: id},
			fmt.Sprintf(`{"lockKey":%d,"event":%s}`, key, quote(t, event)):           {Kind: kindManual, LockKey: key, Event: event},
			fmt.Sprintf(`{"lockKey":"%d","event":%s}`, key, quote(t, event)):         {Kind: kindManual, LockKey: key, Event: event},
			fmt.Sprintf(` { "event" : %s , "lockKey" : %d } `, quote(t, event), key): {Kind: kindManual, LockKey: key, Event: event},
		} {
			m, err := decodeMessage(payload)
			require.NoError(t, err)
			require.Equal(t, want, m)
		}
	})
}

// An event of any content becomes one that fits the column and the wire (C30). It consists of unit,
// repeated count times, and rest, because the fuzzer is fast only with short inputs.
func FuzzCleanEvent(f *testing.F) {
	for _, unit := range []string{
		"a", "synchronize", "\x00", "a\x00b", "\xff", "a\xffb", "\xed\xa0\x80", "\u2028", "\x7f", "\x01", "\n", "<>&", "\"", "\\",
		"é", "\uFFFD", "\U0001f512", "\U0010ffff",
	} {
		for _, count := range []uint16{0, 1, maxEvent/6 - 1, maxEvent / 6, maxEvent/6 + 1, maxEvent / 4, maxEvent / 3,
			maxEvent / 2, maxEvent - 5, maxEvent - 3, maxEvent - 2, maxEvent - 1, 2 * maxEvent} {
			f.Add(unit, count, "\U0001f512")
			f.Add(unit, count, "")
		}
	}
	f.Fuzz(func(t *testing.T, unit string, count uint16, rest string) {
		event := strings.Repeat(unit, min(int(count), 30_000/(len(unit)+1))) + rest
		got := cleanEvent(event)
		require.True(t, utf8.ValidString(got))
		require.NotContains(t, got, "\x00")
		quoted := quote(t, got)
		require.LessOrEqual(t, len(quoted), maxEvent)
		require.Equal(t, got, cleanEvent(got), "cleaning again changes nothing")

		// This is the longest payload that contains the event.
		payload := fmt.Sprintf(`{"kind":"%s","lockKey":%d,"claim":%d,"id":"%s","event":%s}`,
			kindClaim, math.MinInt64, math.MinInt64, uuid.Max, quoted)
		require.LessOrEqual(t, len(payload), maxPayload)

		// No more is cut than necessary.
		if utf8.ValidString(event) && !strings.Contains(event, "\x00") {
			require.True(t, strings.HasPrefix(event, got))
			// plain reports that quoting does not lengthen the event, except by the quotes.
			plain := true
			for _, r := range event {
				plain = plain && r >= 0x20 && r < 0x7f && r != '"' && r != '\\'
			}
			switch {
			case len(event)*6+2 <= maxEvent:
				require.Equal(t, event, got)
			case plain:
				require.Len(t, got, min(len(event), maxEvent-2))
			}
		}
	})
}

// An accepted repo and pull request fit the columns of env_locks (C29), and have one key (C1).
func FuzzRepo(f *testing.F) {
	for _, repo := range []string{"", "a/b", "a\x00", "\x00", "\xff", "a/b\xc3", "é/ü", "\U0010ffff", "\xed\xa0\x80", strings.Repeat("a", 300)} {
		for _, pr := range []uint{0, 1, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32, math.MaxUint} {
			f.Add(repo, pr)
		}
	}
	f.Fuzz(func(t *testing.T, repo string, pr uint) {
		fits := utf8.ValidString(repo) && !strings.Contains(repo, "\x00") && uint64(pr) <= math.MaxInt32
		err := checkRepo(repo, pr)
		require.Equal(t, fits, err == nil, "%v", err)

		provider := &FakeLockProvider{}
		ctx := context.Background()
		key, err := provider.LockKey(ctx, repo, pr)
		if !fits {
			require.Error(t, err)
			require.Zero(t, key)
			return
		}
		require.NoError(t, err)
		require.NotZero(t, key)
		other, err := provider.LockKey(ctx, repo+"x", pr)
		require.NoError(t, err)
		require.NotEqual(t, key, other)
		same, err := provider.LockKey(ctx, repo, pr)
		require.NoError(t, err)
		require.Equal(t, key, same)
	})
}
