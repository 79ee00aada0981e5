// Command credentialprovider is a plugin of kubelet's credential provider protocol: the user that it answers with is the service account
// of the token that it is given, "namespace-name", for the registry of the image.
package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

func main() {
	if err := answer(); err != nil {
		fmt.Fprintln(os.Stderr, "credentialprovider:", err)
		os.Exit(1)
	}
}

func answer() error {
	var request struct {
		APIVersion          string `json:"apiVersion"`
		Image               string `json:"image"`
		ServiceAccountToken string `json:"serviceAccountToken"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		return err
	}
	// Header, claims and signature; who checks that is the registry of a real one.
	parts := strings.Split(request.ServiceAccountToken, ".")
	if len(parts) != 3 {
		return fmt.Errorf("there is no token")
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return err
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	if err := json.Unmarshal(text, &claims); err != nil {
		return err
	}
	account, found := strings.CutPrefix(claims.Subject, "system:serviceaccount:")
	if !found {
		return fmt.Errorf("the token is of no service account")
	}
	registry, _, _ := strings.Cut(request.Image, "/")
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"kind": "CredentialProviderResponse", "apiVersion": request.APIVersion, "cacheKeyType": "Registry", "cacheDuration": "1m",
		"auth": map[string]any{registry: map[string]string{"username": strings.ReplaceAll(account, ":", "-"), "password": "hunter2"}},
	})
}
