package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
)

// sender sends deliveries as GitHub does: recorded ones, as they are or with the number, the branch, the head commit and
// the time of another pull request put in.
type sender struct {
	secret   string
	recorded map[string][]byte // by action
	client   http.Client
}

func newSender() (*sender, error) {
	// Ask where the module lies, so that the demo can be started from anywhere in it.
	module, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	s := &sender{secret: rand.Text(), recorded: make(map[string][]byte), client: http.Client{Timeout: 5 * time.Second}}
	for _, action := range []string{"opened", "synchronize", "closed"} {
		file := filepath.Join(strings.TrimSpace(string(module)), "testdata", "webhooks", "pull_request."+action+".json")
		if s.recorded[action], err = os.ReadFile(file); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// delivery is one webhook delivery, ready to be sent.
type delivery struct {
	id   string
	repo string
	pr   uint
	head string
	page string // of the commit
	body []byte
}

// prepare makes a delivery about a pull request that GitHub has changed just now. An action of which there is no
// recorded delivery is put into one of another action.
func (s *sender) prepare(action string, pr uint, branch, head string) (delivery, error) {
	// Not a struct: everything else that GitHub sends shall stay in.
	var payload map[string]any
	recorded, ok := s.recorded[action]
	if !ok {
		recorded = s.recorded["synchronize"]
	}
	numbers := json.NewDecoder(bytes.NewReader(recorded))
	numbers.UseNumber()
	if err := numbers.Decode(&payload); err != nil {
		return delivery{}, fmt.Errorf("recorded delivery %q: %w", action, err)
	}
	pull, _ := payload["pull_request"].(map[string]any)
	headOfPull, _ := pull["head"].(map[string]any)
	if headOfPull == nil {
		return delivery{}, fmt.Errorf("recorded delivery %q has no head", action)
	}
	payload["action"], payload["number"], pull["number"] = action, pr, pr
	headOfPull["ref"], headOfPull["sha"] = branch, head
	pull["html_url"] = fmt.Sprintf("https://github.com/Codertocat/Hello-World/pull/%d", pr)
	pull["updated_at"] = time.Now().UTC().Format(time.RFC3339) // no more than a second, as GitHub's
	if _, ok := payload["after"]; ok {
		payload["after"] = head
	}
	body, err := json.Marshal(payload)
	if err != nil {
		return delivery{}, err
	}
	return newDelivery(body)
}

// asRecorded makes a delivery of a recorded payload, byte for byte.
func (s *sender) asRecorded(action string) (delivery, error) { return newDelivery(s.recorded[action]) }

// newDelivery gives a payload an id of the kind that GitHub's have: a UUID with the time in it.
func newDelivery(body []byte) (delivery, error) {
	var payload struct {
		Number      uint `json:"number"`
		PullRequest struct {
			URL  string `json:"html_url"`
			Head struct {
				SHA string `json:"sha"`
			} `json:"head"`
		} `json:"pull_request"`
		Repository struct {
			FullName string `json:"full_name"`
		} `json:"repository"`
	}
	if err := json.Unmarshal(body, &payload); err != nil {
		return delivery{}, err
	}
	id, err := uuid.NewUUID()
	return delivery{
		id: id.String(), repo: payload.Repository.FullName, pr: payload.Number, head: payload.PullRequest.Head.SHA,
		page: payload.PullRequest.URL + "/commits/" + payload.PullRequest.Head.SHA, body: body,
	}, err
}

// post sends a delivery, signed, and returns once the service has accepted it.
func (s *sender) post(ctx context.Context, url string, d delivery) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/webhook", bytes.NewReader(d.body))
	if err != nil {
		return err
	}
	signature := hmac.New(sha256.New, []byte(s.secret))
	signature.Write(d.body)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", "pull_request")
	r.Header.Set("X-GitHub-Delivery", d.id)
	r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(signature.Sum(nil)))
	res, err := s.client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusAccepted {
		return fmt.Errorf("delivery %s: %s", d.id, res.Status)
	}
	return nil
}

// holders asks a service's address for operators.
func (s *sender) holders(ctx context.Context, url string) ([]locker.LockStatus, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/locks", nil)
	if err != nil {
		return nil, err
	}
	res, err := s.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET /locks: %s", res.Status)
	}
	var holders []locker.LockStatus
	return holders, json.NewDecoder(res.Body).Decode(&holders)
}

// randomCommit returns what looks like a commit's hash.
func randomCommit() string {
	hash := make([]byte, 20)
	_, _ = rand.Read(hash) // never fails
	return hex.EncodeToString(hash)
}
