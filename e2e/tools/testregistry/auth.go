package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// auth gives tokens to the users of the settings, and knows whose each one is.
//
// It is the "Token Authentication" of the distribution project, with the token server on the registry's own host. Who may pull what is
// looked up when a token is shown, so that a change of the settings counts at once.
type auth struct {
	mutex  sync.Mutex
	tokens map[string]granted
}

// granted is what a token stands for.
type granted struct {
	user  string
	until time.Time
}

// token answers GET /token.
func (a *auth) token(w http.ResponseWriter, request *http.Request, s settings) {
	name, password, _ := request.BasicAuth()
	user := name + ":" + password
	if _, known := s.Users[user]; !known {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "no such user")
		return
	}
	random := make([]byte, 16)
	_, _ = rand.Read(random)
	token, life := hex.EncodeToString(random), s.TokenSeconds
	if life == 0 {
		life = 3600
	}
	a.mutex.Lock()
	defer a.mutex.Unlock()
	if a.tokens == nil {
		a.tokens = map[string]granted{}
	}
	a.tokens[token] = granted{user, time.Now().Add(time.Duration(life * float64(time.Second)))}
	writeJSON(w, map[string]any{"token": token, "expires_in": int(life)})
}

// lets tells whether who asks may pull from the repository; if not, it has answered.
func (a *auth) lets(w http.ResponseWriter, request *http.Request, s settings, repository string) bool {
	if len(s.Users) == 0 {
		return true
	}
	shown, _ := strings.CutPrefix(request.Header.Get("Authorization"), "Bearer ")
	a.mutex.Lock()
	found := a.tokens[shown]
	a.mutex.Unlock()
	if time.Now().Before(found.until) && slices.Contains(s.Users[found.user], repository) {
		return true
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="testregistry",scope="repository:%s:pull"`, request.Host, repository))
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}
