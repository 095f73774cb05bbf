package locker

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
)

// NotificationPayload represents the content of messages sent to the lock
// holder.
type NotificationPayload struct {
	// ID is required so that we can ensure the message came from another
	// party: the ID of the claimant's lock, or the holder's own when the
	// notification has another cause than a newer claim.
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

// NOTIFY takes payloads below 8,000 bytes. The rest of a message, with numbers, IDs, the
// host and labels at their longest, stays below 1,700.
const (
	maxPayload = 7999
	maxLabels  = 1024
	maxEvent   = maxPayload - 1700
)

// The kinds of message on the channel. A message without a kind is an
// operator's: its text becomes the holder's notification.
const (
	kindClaim    = "claim"
	kindReleased = "released"
	kindCheck    = "check" // the session's proof to itself that NOTIFY arrives
	kindManual   = ""
)

// The payloads that statements send, for SQL's format(). The host and the process are
// those of the claim's sender.
var (
	payloadClaim = `{"kind":"` + kindClaim + `","lockKey":%s,"claim":%s,"id":"%s","event":%s,"host":` +
		strings.ReplaceAll(quoteJSON(hostName), "%", "%%") + `,"pid":` + strconv.Itoa(processID)
	payloadPlain = payloadClaim + `}`
	payloadFull  = payloadClaim + `,"labels":%s,"finish":%s}`
)

const payloadReleased = `{"kind":"` + kindReleased + `","lockKey":%s}`

// message is what travels on the channel. It is a hint: nothing but speed
// depends on its arrival.
type message struct {
	Kind    string            `json:"kind,omitempty"`
	LockKey int64             `json:"lockKey"`
	ID      uuid.UUID         `json:"id"`
	Event   string            `json:"event"`
	Claim   int64             `json:"claim,omitempty"`
	Host    string            `json:"host,omitempty"`
	PID     int               `json:"pid,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Finish  bool              `json:"finish,omitempty"` // the claim lets the holder finish
}

// claimed returns the event of a message about a claim. Claims are numbered by the
// server's clock.
func (m *message) claimed() event {
	return event{kind: evClaimed, from: standing{m.Claim, m.ID}, finish: m.Finish, claim: &ClaimInfo{
		ID: m.ID, Event: m.Event, Labels: m.Labels, Host: m.Host, PID: m.PID, Since: time.UnixMicro(m.Claim)}}
}

func quoteJSON(text string) string {
	b, _ := json.Marshal(text) // strings can always be encoded
	return string(b)
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
		return m, annotate(err, "locker: decode notification")
	}
	m = strict.message
	switch m.Kind {
	case kindClaim, kindReleased, kindManual:
		if strict.LockKey == nil {
			return m, errors.New("locker: decode notification: no lockKey")
		}
		key, err := strict.LockKey.Int64()
		if err != nil {
			return m, annotate(err, "locker: decode notification")
		}
		m.LockKey = key
	case kindCheck:
	default:
		return m, fmt.Errorf("locker: decode notification: unknown kind %q", m.Kind)
	}
	return m, nil
}

// cleanText makes any text fit for a text column and for the wire: valid UTF-8, no NUL.
func cleanText(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// cleanEvent also makes an event short enough once it is quoted, and never cuts it inside
// a rune.
func cleanEvent(event string) string {
	event = cleanText(event)
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
// may be unable to hold: with most encodings all that are not ASCII.
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
