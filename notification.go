package locker

import (
	"encoding/json"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// NotificationPayload represents the content of messages sent to the lock
// holder.
type NotificationPayload struct {
	// ID is required so that we can ensure the message came from another
	// party: the ID of the claimant's lock, or the holder's own when the
	// notification has another cause than a newer claim (C13).
	ID uuid.UUID `json:"id"`
	// Message provides some context as to why the notification was generated:
	// the claimant's event, an operator's reason, or the text of the cause.
	// Useful for logging purposes.
	Message string `json:"event"`
	// LockKey is the key that this notification pertains to. In JSON it is a number, as
	// the original library has it. A reader needs integers of 64 bits.
	LockKey int64 `json:"lockKey"`
}

// notifyChannel carries every notification of every key. (The original library
// uses one channel per key, named by the decimal key.)
const notifyChannel = "env_lock_events"

// NOTIFY takes payloads below 8,000 bytes; the rest of a message, with numbers
// and IDs at their longest, stays below 300.
const (
	maxPayload = 7999
	maxEvent   = maxPayload - 300
)

// The kinds of message on the channel. A message without a kind is an
// operator's: its text becomes the holder's notification.
const (
	kindClaim    = "claim"
	kindReleased = "released"
	kindCheck    = "check" // the session's proof to itself that NOTIFY arrives
	kindManual   = ""
)

// The payloads that statements send, for SQL's format().
const (
	payloadClaim    = `{"kind":"` + kindClaim + `","lockKey":%s,"claim":%s,"id":"%s","event":%s}`
	payloadReleased = `{"kind":"` + kindReleased + `","lockKey":%s}`
)

// message is what travels on the channel. It is a hint: nothing but speed
// depends on its arrival.
type message struct {
	Kind    string    `json:"kind,omitempty"`
	LockKey int64     `json:"lockKey"`
	ID      uuid.UUID `json:"id"`
	Event   string    `json:"event"`
	Claim   int64     `json:"claim,omitempty"`
}

// decodeMessage reads one payload of the channel. Anybody may write there, so
// everything is possible. The key may be a string: a client in JavaScript has no
// number for it.
func decodeMessage(payload string) (message, error) {
	var m message
	var strict struct {
		message
		LockKey *json.Number `json:"lockKey"`
	}
	if err := json.Unmarshal([]byte(payload), &strict); err != nil {
		return m, errors.Wrap(err, "locker: decode notification")
	}
	m = strict.message
	switch m.Kind {
	case kindClaim, kindReleased, kindManual:
		if strict.LockKey == nil {
			return m, errors.New("locker: decode notification: no lockKey")
		}
		key, err := strict.LockKey.Int64()
		if err != nil {
			return m, errors.Wrap(err, "locker: decode notification")
		}
		m.LockKey = key
	case kindCheck:
	default:
		return m, errors.Errorf("locker: decode notification: unknown kind %q", m.Kind)
	}
	return m, nil
}

// cleanEvent makes any text fit for a text column and for the wire (C30): valid
// UTF-8, no NUL, short enough once it is quoted, and never cut inside a rune.
func cleanEvent(event string) string {
	event = strings.ToValidUTF8(event, "\uFFFD")
	event = strings.ReplaceAll(event, "\x00", "\uFFFD")
	if len(event)*6+2 <= maxEvent { // no byte takes more than six when quoted
		return event
	}
	size := 2
	for i, r := range event {
		size += quotedSize(r)
		if size > maxEvent {
			return event[:i]
		}
	}
	return event
}

// storable replaces the characters of a text that a database with the given encoding
// may be unable to hold (C30): with most encodings all that are not ASCII.
func storable(text, encoding string) string {
	if encoding == "UTF8" || encoding == "SQL_ASCII" { // the latter takes any bytes
		return text
	}
	western := encoding == "LATIN1" || encoding == "WIN1252"
	return strings.Map(func(r rune) rune {
		if r < 0x80 || western && r >= 0xA0 && r <= 0xFF {
			return r
		}
		return '?'
	}, text)
}

// quotedSize is the most bytes that a rune takes in a JSON string.
func quotedSize(r rune) int {
	switch {
	case r == '"', r == '\\':
		return 2
	case r < 0x20, r == 0x7f, r == '\u2028', r == '\u2029':
		return 6
	}
	return utf8.RuneLen(r)
}
